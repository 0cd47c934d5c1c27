"""`fade env`."""

import json
from typing import Annotated

import typer

from fade.cli.output import fact_table, terminal


def env(as_json: Annotated[bool, typer.Option("--json", help="Print it as JSON.")] = False) -> None:
    """Say which versions, devices and compiled kernels are in use; paste it into a bug report.

    Example: [bold]fade env[/bold]
    """
    import importlib.metadata
    import importlib.util
    import platform

    import torch

    import fade
    import fade_kernels
    from fade.adapter import versions

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    facts = {
        "fade": fade.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: version for package, version in versions().items() if package != "fade-unlearning"},
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else "not installed",
        "cpu threads": torch.get_num_threads(),
        "gpus": gpus or "none",
        **{f"kernels: {name}": value for name, value in fade_kernels.build_info().items()},
    }
    if as_json:
        print(json.dumps(facts, indent=2, default=str))
    else:
        terminal().print(fact_table("environment", facts))
