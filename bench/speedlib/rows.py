"""What is measured: one row for each part, size and dtype, with a key by which results know it."""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass

DTYPES = ("float32", "bfloat16", "float16")
OURS = ("ldm", "ldm-kernels")
THEIRS = ("diffusers", "diffusers-best", "diffusers-default")
# Who runs only where --peers names them (peers.py), and in which parts and dtypes.
PEERS = ("openvino", "diffusers-frozen")
PEER_PARTS, PEER_DTYPES = ("clip", "unet", "vae-decode"), ("float32", "bfloat16")
HAS_DIFFUSERS = importlib.util.find_spec("diffusers") is not None
# Whose float32 is the reference, and whose half precision the yardstick. Alone, our plain code has to do.
BASELINE = "diffusers" if HAS_DIFFUSERS else "ldm"
CONTESTANTS = (*OURS, *THEIRS)  # without PEERS
PLAIN = ("ldm", "diffusers")

NETWORKS = ("clip", "unet", "vae-encode", "vae-decode")  # parts that are one call of one network
PROCESSES = ("import", "load", "cold-start", "memory")  # parts that take a fresh process for each run
MERIT = {"load": "ready_seconds", "memory": "gb"}  # what a part is compared by, if not by seconds

SHORT = ("clip/b2/*", "unet/b2/float32", "unet/b2/bfloat16", "vae-decode/b1/*")


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        part: of NETWORKS or PROCESSES, "image" (guided, `steps` steps, `batch` pictures) or "train" (forward,
            backward and AdamW's step).
        dtype: a name; "" for what has none.
        batch: of the UNet itself, so that 2 is a guided step of one picture; of pictures elsewhere.
        px: side of the pictures in pixels.
        compiled: whether those contestants that can be are compiled.
    """

    part: str
    dtype: str
    px: int
    batch: int = 1
    steps: int = 0
    compiled: bool = False

    @property
    def key(self) -> str:
        size = {"image": f"{self.steps}-b{self.batch}", "memory": str(self.px)}.get(
            self.part, f"b{self.batch}"
        )
        words = [self.part, *([size] if self.part not in PROCESSES or self.part == "memory" else [])]
        return "/".join(
            [*words, *([self.dtype] if self.dtype else []), *(["compiled"] if self.compiled else [])]
        )

    @property
    def merit(self) -> str:
        """Name the figure that contestants are compared by; less of it is better."""
        return MERIT.get(self.part, "seconds")

    @property
    def contestants(self) -> tuple[str, ...]:
        """Name those who differ here.

        A text encoder has nothing to strengthen but by compiling it. "diffusers-default" loads as from_single_file does
        when it is told no dtype: in float32, whatever the file has.
        """
        if self.part == "import":
            return PLAIN
        if self.part == "load":
            return PLAIN if self.dtype == "float32" else (*PLAIN, "diffusers-default")
        absent = ["diffusers-default"]
        if self.part == "clip" and not self.compiled:
            absent.append("diffusers-best")
        if self.part not in PEER_PARTS or self.dtype not in PEER_DTYPES or self.compiled:
            absent += PEERS
        return tuple(name for name in (*CONTESTANTS, *PEERS) if name not in absent)


def all_rows(px: int, device: str, dtypes: Iterable[str], compiled: bool = False) -> list[Row]:
    """List every row for a geometry of pictures px pixels wide, dtype by dtype, so that weights are made once each.

    Whole processes in float16 need a GPU: on a CPU ldm's own doors compute in float32 instead.
    """
    rows = [] if compiled else [Row("import", "", px)]
    for dtype in dtypes:

        def row(part: str, batch: int = 1, steps: int = 0, size: int = px, dtype: str = dtype) -> Row:
            return Row(part, dtype, size, batch, steps, compiled)

        rows += [row("clip", 1), row("clip", 2)]
        rows += [row("unet", batch) for batch in (1, 2, 8, 16)]
        rows += [row("vae-encode"), row("vae-decode")]
        rows += [row("image", batch, steps) for steps in (20, 50) for batch in (1, 8)]
        rows += [row("train")]
        rows += [] if compiled else [row("load")]
        if device == "cuda" or dtype != "float16":
            rows += [row("cold-start"), row("memory"), row("memory", size=2 * px)]
    return rows
