"""The BN clinic: running statistics looked at, recomputed, adapted, folded and ported."""
