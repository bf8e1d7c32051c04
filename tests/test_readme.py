"""What the README shows to be run is run."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_someone_elses_loop_runs_and_learns(capsys):
    (block,) = (
        block
        for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL)
        if "class Net" in block
    )
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})
    *steps, last = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in steps] == [str(step) for step in range(1, 9)]
    assert "accuracy" in last


def test_every_config_and_module_that_it_names_exists():
    root = Path(__file__).parents[1]
    for name in re.findall(r"\]\(((?:configs|bnjax|scripts)/[^)]+)\)", README):
        assert (root / name).exists(), name
    for module in re.findall(r"python -m (bnjax\.\w+)", README):
        place = root / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module
    for config in re.findall(r"configs/\w+\.py", README):
        assert (root / config).exists(), config
    named = set(re.findall(r"configs/(\w+)\.py", README))
    assert {path.stem for path in (root / "configs").glob("*.py")} <= named
