"""`bnjax fold`: folds the batch norms of a trained network into its layers."""

from bnjax.commands import Checkpoint, Out, ProbeDir, Workdir


def run(
    workdir: Workdir, checkpoint: Checkpoint = "last", data_dir: ProbeDir = None, out: Out = None
) -> int:
    """Fold the batch norms of a trained network into its layers where folding is exact.

    The command compares the logits before and after folding, and lists the norms that cannot be
    folded with the reasons. The exit status is 1 if no norm can be folded.
    """
    import jax
    import numpy as np

    from bnjax.clinic.folding import plan
    from bnjax.text import text_table
    from bnjax.train import rundir
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained, check_folded

    prepare()
    if out:
        rundir.check_is_free(out)
    trained = Trained(workdir, checkpoint)
    before = trained.network
    folding = plan(before, np.zeros((1, *trained.data.image_shape), np.uint8))
    rows = [
        (
            ".".join(norm),
            f"{place} {'.'.join(layer)}, folded into it" if layer else f"not folded: {reason}",
        )
        for norm, layer, place, reason in folding.norms
    ]
    print(text_table(rows) if rows else "the network has no batch norm")
    if not any(one.layer for one in folding.norms):
        print("no norm was folded, so nothing was written")
        return 1
    about = check_folded(trained, folding, data_dir)
    counts = [sum(leaf.size for leaf in jax.tree.leaves(one)) for one in (before, folding.network)]
    print(
        f"\n{counts[0]:,} numbers before, {counts[1]:,} after\n"
        f"logits of {about['probe']} differ by {about['difference']:.1e} of the largest logit"
    )
    if out:
        trained.write(out, folding.network, about)
        print(f"\npredict with:    bnjax predict --workdir {out} --split test")
    return 0
