"""The paper's figures as printed, except where it swaps columns (docs/paper.md)."""

from __future__ import annotations

from dataclasses import dataclass

# Table 1: left factor -> parameters per matrix, parameters of the model.
TABLE1 = {
    "64x32": (3200, 67_893_504),
    "64x48": (3840, 67_908_864),
    "96x32": (3840, 67_908_864),
    "64x64": (4672, 67_928_832),
    "128x32": (4672, 67_928_832),
    "96x48": (5120, 67_939_584),
    "96x64": (6528, 67_973_376),
    "128x48": (6528, 67_973_376),
    "128x64": (8480, 68_020_224),
    "96x96": (9472, 68_044_032),
    "192x48": (9472, 68_044_032),
    "128x96": (12480, 68_116_224),
    "192x64": (12480, 68_116_224),
    "128x128": (16528, 68_213_376),
    "1024x256": (262_153, 74_108_376),
    "768x384": (294_920, 74_894_784),
    "1024x384": (393_222, 77_254_032),
    "768x768": (589_828, 81_972_576),
    "1536x384": (589_828, 81_972_576),
    "1024x768": (786_435, 86_691_144),
    "1536x768": (1_179_650, 96_128_304),
    "3072x768": (2_359_297, 124_439_832),
}

# Table 2: left factor -> millions of parameters with 1, 2 and 3 factors. Table 3: scheme -> millions.
TABLE2 = {"256x64": (68.2, 68.6, 69.0), "1024x256": (74.0, 80.0, 86.0)}
TABLE3 = {"KronyPT-80M-2-factors": ("1024x256:2", 80.0), "KronyPT-92M-4-factors": ("1024x256:4", 92.2)}


@dataclass(frozen=True, kw_only=True)
class Norms:
    """Two rows of Table 4: the norms of one matrix in GPT-2, in 96M and in 92M.

    Attributes:
        layer: as the paper numbers it.
        matrix: 1 is ``c_fc``, 2 is ``c_proj``.
        frobenius: Frobenius norms.
        l1: l1 norms, in thousands.
        share: of the Frobenius norm that 92M keeps, per cent.
    """

    layer: int
    matrix: int
    frobenius: tuple[float, float, float]
    l1: tuple[float, float, float]
    share: float


TABLE4 = (
    Norms(layer=1, matrix=1, frobenius=(216, 153, 146), l1=(248, 154, 161), share=67.6),
    Norms(layer=1, matrix=2, frobenius=(135, 95, 91), l1=(151, 84, 94), share=67.4),
    Norms(layer=2, matrix=1, frobenius=(200, 142, 134), l1=(235, 132, 157), share=67.0),
    Norms(layer=2, matrix=2, frobenius=(133, 94, 92), l1=(151, 103, 91), share=69.1),
    Norms(layer=11, matrix=1, frobenius=(199, 141, 134), l1=(241, 170, 161), share=67.3),
    Norms(layer=11, matrix=2, frobenius=(304, 217, 204), l1=(335, 243, 223), share=67.1),
)

SETS = ("wikitext-103", "wikitext-2", "lambada")
Perplexities = tuple[float, float, float]  # in the order of SETS

GPT2: Perplexities = (29.16, 24.67, 45.28)
DISTILGPT2: Perplexities = (44.53, 36.48, 76.00)
TABLE5_81M: Perplexities = (42.74, 35.75, 61.02)
TABLE5_80M: Perplexities = (41.06, 34.56, 66.88)
TABLE6_81M: Perplexities = (43.24, 35.93, 60.99)
TQCOMPRESSED: Perplexities = (40.28, 32.25, 64.72)
KNGPT2: Perplexities = (40.97, 32.81, 67.62)
PRUNE: Perplexities = (38.22, 32.19, 54.52)
VAN_LOAN: Perplexities = (41.98, 34.99, 64.92)  # also Table 8's 96M after full training
TABLE8_96M_EPOCH: Perplexities = (56.69, 47.42, 76.95)  # the wikitext columns as in Table 9
TABLE8_92M_EPOCH: Perplexities = (45.13, 39.50, 68.38)
TABLE8_92M: Perplexities = (40.78, 34.75, 60.74)
TABLE9_96M: Perplexities = (57.46, 47.42, 76.95)
TABLE9_92M: Perplexities = (45.19, 36.65, 74.57)
