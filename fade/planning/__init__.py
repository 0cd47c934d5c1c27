"""Memory of a run on paper: `plan(model)` counts it from configurations alone, on the meta device."""

from fade.planning.advice import Advice, advise
from fade.planning.memory import Column, Model, Plan, Run, plan, with_batch
from fade.planning.models import shipped

__all__ = ["Advice", "Column", "Model", "Plan", "Run", "advise", "plan", "shipped", "with_batch"]
