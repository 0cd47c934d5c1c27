"""What differs from one model family to another: a file with a descriptor for each, and the table of all.

A new family is such a file and a line here (`docs/add-a-family.md`).
"""

from fade.backbones.families.auraflow import AURAFLOW
from fade.backbones.families.chroma import CHROMA
from fade.backbones.families.cogview4 import COGVIEW4
from fade.backbones.families.descriptor import JOINT_PROJECTIONS, PROJECTIONS, Family, Reader, Segment, Vae
from fade.backbones.families.flux1 import FLUX1
from fade.backbones.families.flux2 import FLUX2, FLUX2_KLEIN
from fade.backbones.families.hidream import HIDREAM
from fade.backbones.families.hunyuan_image import HUNYUAN_IMAGE
from fade.backbones.families.kandinsky5 import KANDINSKY5
from fade.backbones.families.lumina2 import LUMINA2
from fade.backbones.families.pixart_sigma import PIXART_SIGMA
from fade.backbones.families.qwen_image import QWEN_IMAGE
from fade.backbones.families.sana import SANA
from fade.backbones.families.sd3 import SD3
from fade.backbones.families.sdxl import SDXL
from fade.backbones.families.stable_diffusion import STABLE_DIFFUSION
from fade.backbones.families.z_image import Z_IMAGE

__all__ = ["FAMILIES", "JOINT_PROJECTIONS", "PROJECTIONS", "Family", "Reader", "Segment", "Vae"]

FAMILIES: tuple[Family, ...] = (
    SDXL,
    STABLE_DIFFUSION,
    PIXART_SIGMA,
    SD3,
    FLUX1,
    CHROMA,
    QWEN_IMAGE,
    SANA,
    AURAFLOW,
    LUMINA2,
    Z_IMAGE,
    COGVIEW4,
    FLUX2_KLEIN,
    FLUX2,
    HIDREAM,
    KANDINSKY5,
    HUNYUAN_IMAGE,
)
"""Where pipelines of two families share the denoiser's class, the one with more parts, or with `classes`, first."""
