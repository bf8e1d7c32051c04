"""TensorBoard's event files, read back with the protos of the format."""

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c


def read_events(folder):
    """Returns the events of all files in a folder, checksums verified.

    A file is a row of: length, its checksum, the event, its checksum.
    """
    events = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            length = int.from_bytes(content[:8], "little")
            assert int.from_bytes(content[8:12], "little") == masked_crc32c(content[:8])
            events.append(Event.FromString(content[12 : 12 + length]))
            content = content[16 + length :]
    return events


def read_values(folder):
    """Returns what was written by tag: a list of steps and values."""
    found = {}
    for event in read_events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value))
    return found
