"""How stage 1 keeps within a memory budget: whose saliency is measured together, and where the accumulators are.

Numbers in, a plan out: nothing here looks at a model or a device, so that a run can be planned from configs alone.

The saliency of a weight takes 4 bytes, or 8 while that of `contrast` is measured (an accumulator for the forget set and
one for the retain set). In the order of preference, where

- `device`  all accumulators are on the device at once, and every backward pass serves all layers;
- `host`    all are in host memory, and a layer's is brought to the device and back in each backward pass. By reckoning,
            not measured: FLUX.1's 10 GB there and back are less than one more pass over 16 pictures of 1024 pixels;
- `groups`  layers are measured group after group, in the model's order, each through the same batches, noise and
            timesteps. Between groups the host holds what may still be selected (`fade_kernels.GroupedSelection`).

The result is the same, bit for bit where a pass over the same numbers gives the same bits. Beside the accumulators a
plan counts what one backward pass takes, one layer's gradient, and the masks, a bit for each weight.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fade.errors import FadeError
from fade.measure import human_bytes

FLOAT = 4
"""Bytes of a float32."""

Places = Literal["device", "host", "groups"]


@dataclass(frozen=True)
class SaliencyPlan:
    """What is measured together, and the most bytes at once.

    Attributes:
        place: `device`, `host` or `groups`, as above.
        groups: names of the layers measured together; one group but where `place` is `groups`.
        weights: how many weights, or of them the regions', have a saliency.
        accumulator_bytes: accumulators that exist at once.
        pass_bytes: what a backward pass takes beside them and the model; 0 where that was not asked.
        device_bytes: all that is on the device at once, beside the model.
        host_bytes: all that is in host memory; 0 where that is the device's.
        passes: backward passes in all.
    """

    place: Places
    groups: tuple[tuple[str, ...], ...]
    weights: int
    accumulator_bytes: int
    pass_bytes: int
    device_bytes: int
    host_bytes: int
    passes: int

    def record(self) -> dict[str, Any]:
        """The plan as a run's record has it; of each group its first and last layer."""
        groups = [{"layers": len(names), "first": names[0], "last": names[-1]} for names in self.groups]
        return {**vars(self), "groups": groups}

    def remark(self, device: str) -> str:
        """The plan on one line."""
        layers, place = sum(map(len, self.groups)), f"on {device}"
        if self.place == "host":
            place = f"in host memory, each brought to {device} and back"
        elif self.place == "groups":
            place = f"{place} in {len(self.groups)} groups of {' + '.join(str(len(names)) for names in self.groups)}"
        passing = f", {human_bytes(self.device_bytes)} with a backward pass" if self.pass_bytes else ""
        return (
            f"saliency of {layers:,} layers ({self.weights:,} weights), accumulators {place}: "
            f"{human_bytes(self.accumulator_bytes)} at once{passing}; {self.passes} backward passes"
        )


def plan_saliency(
    weights: Mapping[str, int],
    budget: int,
    host: int | None,
    *,
    accumulators: int = 1,
    kept: int = 1,
    pass_bytes: int = 0,
    passes: int = 1,
) -> SaliencyPlan:
    """The plan that takes the least time of those that fit.

    Args:
        weights: how many weights each layer has that may change, by name, in the model's order.
        budget: bytes that the device has for stage 1, beside the model.
        host: bytes that host memory has for it; None where the device computes in that.
        accumulators: for each weight: 2 for `contrast`, else 1.
        kept: how many weights are selected in the end.
        pass_bytes: bytes that one backward pass takes.
        passes: backward passes that every group takes.

    Raises FadeError where nothing fits, with the least that would.
    """
    total, largest = sum(weights.values()), max(weights.values())
    each, masks, held = FLOAT * accumulators, -(-total // 8), FLOAT * kept
    fixed = pass_bytes + FLOAT * largest + masks

    def plan(place: Places, groups: list[list[str]], at_once: int, on_device: int, on_host: int) -> SaliencyPlan:
        named = tuple(tuple(group) for group in groups)
        return SaliencyPlan(place, named, total, at_once, pass_bytes, on_device, on_host, passes * len(groups))

    whole = fixed + each * total
    if whole <= budget:
        return plan("device", [list(weights)], each * total, whole, 0)
    least = [whole]
    if host is not None and each * total + masks <= host:
        with_buffer = fixed + FLOAT * largest
        if with_buffer <= budget:
            return plan("host", [list(weights)], each * total, with_buffer, each * total + masks)
        least.append(with_buffer)

    def selecting(size: int) -> int:
        """Bytes of the values that a group of so many weights may have among the selected."""
        return FLOAT * min(kept, size)

    def group_bytes(size: int) -> int:
        return fixed + each * size + selecting(size) + (held if host is None else 0)

    if host is None or held + selecting(largest) + masks <= host:
        if group_bytes(largest) <= budget:
            groups, sizes = [], []
            for name, size in weights.items():
                if groups and group_bytes(sizes[-1] + size) <= budget:
                    groups[-1].append(name)
                    sizes[-1] += size
                else:
                    groups.append([name])
                    sizes.append(size)
            on_host = 0 if host is None else held + selecting(max(sizes)) + masks
            return plan("groups", groups, each * max(sizes), group_bytes(max(sizes)), on_host)
        least.append(group_bytes(largest))
    passing = f", {human_bytes(pass_bytes)} of them for a backward pass" if pass_bytes else ""
    raise FadeError(
        f"stage 1 does not fit into the memory budget of {human_bytes(budget)}: it takes at least {min(least):,} bytes"
        f"{passing}. Raise --memory-budget (in Python: locate.memory_budget), target fewer layers, or make a pass "
        "smaller by gradient checkpointing, a lower resolution or a smaller locate.batch_size"
    )
