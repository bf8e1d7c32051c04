"""`bnjax serve`: serves a page that scores images with a trained network."""

from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from bnjax.commands import Checkpoint
from bnjax.errors import UserError, needs


def run(
    workdir: Annotated[Path | None, arg(metavar="DIR", help="the folder of the run")] = None,
    checkpoint: Checkpoint = "last",
    model: Annotated[
        Path | None, arg(metavar="DIR", help="the folder of an exported network")
    ] = None,
    host: Annotated[
        str, arg(metavar="ADDRESS", help="the address to listen on; default: this machine only")
    ] = "127.0.0.1",
    port: Annotated[int, arg(metavar="N", help="the port to listen on; 0: any free port")] = 7860,
) -> int:
    """Serve a page for trying a trained network in the browser; Ctrl-C stops the server.

    The page shows the scores of images under stored statistics, under batch statistics, and under
    mean 0 and variance 1, and the drift of each norm. Programs can use the endpoint /predict
    (gradio_client). There is no password: anyone with access to the port can use the page.
    """
    if bool(workdir) == bool(model):
        raise UserError("give either --workdir, the folder of a run, or --model.")
    if model and checkpoint != "last":
        raise UserError("--checkpoint needs a run: give its folder with --workdir.")
    with needs("serve", "bnjax serve"):
        from bnjax.export import page
    from bnjax.train.cpu import prepare

    prepare()
    scores: page.Scores | page.ExportedScores
    if model:
        from bnjax.export.stablehlo import Exported

        scores = page.ExportedScores(Exported(model))
    else:
        from bnjax.train.trained import Trained

        scores = page.Scores(Trained(Path(str(workdir)), checkpoint))
    demo = page.page(scores)
    try:
        url = page.launch(demo, host, port or None)
    except (OSError, ValueError) as error:
        raise UserError(
            f"bnjax serve cannot listen on {host}, port {port}: {error}. Choose a free port with "
            "--port (0 for any); --host must be an address of this machine."
        ) from error
    print(f"{model or workdir} is served at {url} (Ctrl-C to stop)", flush=True)
    demo.block_thread()  # returns on Ctrl-C
    print("\nstopped")
    return 0
