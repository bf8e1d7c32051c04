import subprocess
import sys


def test_only_that_package_is_dropped_and_the_level_stays():
    code = """
import absl.logging, sys
from bnjax.quiet import drop_logs
absl.logging.use_absl_handler()
before = absl.logging.get_verbosity()
drop_logs("noisy"); drop_logs("noisy")
log = "absl.logging.warning('from ' + __name__)\\nabsl.logging.error('bad ' + __name__)"
for name, file in (("noisy", "/site/noisy/module.py"), ("mine", "/home/mine.py")):
    exec(compile(log, file, "exec"), {"absl": absl, "__name__": name})
print(before == absl.logging.get_verbosity())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    for said in ("bad noisy", "from mine", "bad mine"):
        assert said in done.stderr
    assert "from noisy" not in done.stderr
