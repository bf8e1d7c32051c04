"""Networks that accept any norm layer."""
