"""`bnjax export`: writes a trained network as files that run without bnjax."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from bnjax.commands import Checkpoint, ProbeDir, Workdir


def run(
    workdir: Workdir,
    out: Annotated[Path, arg(metavar="DIR", help="the output folder, for bnjax predict --model")],
    checkpoint: Checkpoint = "last",
    data_dir: ProbeDir = None,
    no_fold: Annotated[
        bool, arg(help="keep all batch norms; by default they are folded where folding is exact")
    ] = False,
    onnx: Annotated[bool, arg(help="also write ONNX")] = False,
) -> int:
    """Write a trained network as files that run without bnjax.

    The files map 8-bit images to logits: a StableHLO program for CPUs, GPUs and TPUs with separate
    weights, and optionally ONNX. The command compares their logits with those of the run.
    """
    from bnjax.export.stablehlo import export_run
    from bnjax.train.cpu import prepare
    from bnjax.train.trained import Trained

    prepare()
    trained = Trained(workdir, checkpoint)
    manifest = export_run(trained, out, folded=not no_fold, onnx=onnx, data_dir=data_dir)
    for norm, layer in manifest.folded.items():
        print(f"{norm} is folded into {layer}")
    for norm, reason in manifest.kept.items():
        print(f"{norm} is not folded: {reason}")
    for name in manifest.files:
        print(f"{out / name}: {(out / name).stat().st_size:,} bytes")
    images = manifest.agreement["images"]
    for name, difference in manifest.agreement.items():
        if name != "images":
            print(f"{name}: logits of {images} differ by {difference:.1e} of the largest logit")
    print(f"\npredict with:    bnjax predict --model {out} IMAGE")
    return 0
