"""How much each weight matters to a set of latents: the diagonal of the Fisher information, I = mean over batches of
(∂L/∂W)² of the denoising loss, streamed as saliency is (`fade.saliency`). What methods of continual learning and of
unlearning weigh weights by."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from fade.backbones import Backbone
from fade.conditioning import EncodedPrompts
from fade.config import LocateConfig
from fade.latents import Latents
from fade.progress import progress_bar, tell
from fade.regions import Region
from fade.saliency import gradient_sums, measure_pass, plan_of
from fade.saliency_plan import SaliencyPlan


class Importance:
    """The importance of the weights of `layers` to parts of the latents: `forget`, with the concept's prompts, and
    `retain`, with theirs.

    Of `config` the size of a batch, `passes` and `per_sample` count: as with every Fisher information of batches, I
    depends on how many samples one has. `plan` says which layers are measured together, and where their accumulators
    are; raises FadeError where none fits into what memory is free.
    """

    def __init__(
        self,
        backbone: Backbone,
        layers: Mapping[str, nn.Module],
        latents: Latents,
        prompts: EncodedPrompts,
        config: LocateConfig,
        seed: int,
        parts: Sequence[str] = ("forget", "retain"),
        regions: Mapping[str, Region] | None = None,
    ) -> None:
        self.backbone, self.layers, self.latents, self.prompts = backbone, layers, latents, prompts
        self.seed, self.regions = seed, regions or {}
        self._batches = {part: config.passes * -(-len(getattr(latents, part)) // config.batch_size) for part in parts}
        # As much memory as a saliency with as many accumulators, of which any weight may be chosen.
        like = "contrast" if len(parts) == 2 else "denoising"
        self.config = replace(config, saliency=like, granularity="element", keep=1.0, memory_budget=None)
        needed = measure_pass(backbone, layers, latents, prompts, self.config, seed)
        self.plan: SaliencyPlan = plan_of(
            layers, self.config, None, self.regions, sum(self._batches.values()), needed
        )  # fmt: skip

    def measure(self, progress: bool = False) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Each layer's name and, by part, its importances: float32 [N, K] of its weight, or its region's shape, on the
        layer's device. In the layers' order; each is the caller's, who frees it before taking the next."""
        tell(self.plan.remark(str(self.backbone.device)), progress)
        with progress_bar("measuring importance", self.plan.passes, progress) as advance:
            for names in self.plan.groups:
                group = {name: self.layers[name] for name in names}
                sums = {}
                for part, batches in self._batches.items():
                    asked = self.prompts.rows(getattr(self.latents, f"{part}_prompts"))
                    sums[part] = gradient_sums(
                        self.backbone, group, getattr(self.latents, part), asked, self.prompts, self.config, self.seed,
                        f"importance {part}", mode="square", regions=self.regions, batches=batches,
                        on_host=self.plan.place == "host", advance=advance,
                    )  # fmt: skip
                for name in names:
                    device = self.layers[name].weight.device
                    yield (
                        name,
                        {
                            part: found.pop(name).flatten(1).to(device).div_(self._batches[part])
                            for part, found in sums.items()
                        },
                    )
