"""`python -m bnjax.data.fetch URL FOLDER`: one verified download, in a process that can be killed.

Prints the path of the file, or one line that says what failed and exits with 1. The progress bar goes to standard error.
"""

import sys

from bnjax.data.tfds import import_tfds


def main(url: str, folder: str) -> int:
    """Downloads with TensorFlow Datasets' manager, which knows the checksum of every file it is asked for."""
    tfds = import_tfds()
    tfds.display_progress_bar(sys.stderr.isatty())
    manager = tfds.download.DownloadManager(download_dir=folder, force_checksums_validation=True)
    try:
        print(manager.download(url))
    except Exception as error:  # requests, TFDS and the file system each have their own; all mean "no download"
        print(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
