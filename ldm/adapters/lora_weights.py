"""How each family of LoRA changes a weight: one function for each, without a model and without a file.

All compute dW of W' = W + strength * dW in float32. W is (out, in) of a linear layer, (out, in, k, k) of a convolution
or (channels,) of a norm; r is the rank. Programs disagree in places; which one is followed stands at each function:
A1111 is AUTOMATIC1111/stable-diffusion-webui 1.10, ComfyUI its state of October 2025, LyCORIS 4.1, PEFT 0.21.

| family | paper |
|---|---|
| LoRA, LoCon | Hu et al. 2021, eq. 3; convolutions as two, LyCORIS (Yeh et al. 2023), section 3 |
| LoHa | Hyeon-Woo et al. 2021 (FedPara), proposition 2 |
| LoKr | Yeh et al. 2023, section 3.2 |
| DoRA | Liu et al. 2024, eq. 5 |
| GLoRA | Chavan et al. 2023, eq. 9, without c, d and e |
| IA3 | Liu et al. 2022, section 3.3 |
| OFT, BOFT | Qiu et al. 2023, section 3; Liu et al. 2023, eq. 3 |
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Role -> tensor, as ldm.adapters.lora_keys names them.
Parts = Mapping[str, Tensor]
INPAINTING_CHANNELS, PLAIN_CHANNELS = 9, 4


def alpha_in(dtype: torch.dtype, alpha: Tensor) -> Tensor:
    """Give alpha (a number) in a dtype where that holds it exactly: bfloat16 does not hold 257, and alpha / r is 1."""
    short = alpha.to(dtype)
    return short if short.double() == alpha.double() else alpha


class UnfitError(Exception):
    """The tensors of one module do not fit one another, or not the weight; whoever knows file and module says so."""


@dataclass(frozen=True)
class Family:
    """A way to change a weight.

    Attributes:
        name: what people call it.
        needs: roles without which it is not this family.
        may: roles that may be there besides.
        delta: (parts, W) -> dW, both float32 and of W's shape.
        sizes: (parts, k * k of W) -> (out, in * k * k) that the parts are for, None where they do not say.
        rank: parts -> r, by which alpha is divided; None where it has none.
        one_of: roles of which at least one has to be there; empty = `needs` says all.

    `sizes` raises UnfitError where the parts do not fit one another.
    """

    name: str
    needs: frozenset[str]
    may: frozenset[str]
    delta: Callable[[Parts, Tensor], Tensor]
    sizes: Callable[[Parts, int], tuple[int | None, int | None]]
    rank: Callable[[Parts], int | None] = lambda parts: None
    one_of: frozenset[str] = frozenset()

    def takes(self, roles: set[str]) -> bool:
        """Whether tensors of these roles, and no others, make a change of this family."""
        return self.needs <= roles <= self.needs | self.may and (not self.one_of or bool(roles & self.one_of))


def _sizes(shape: Sequence[int | None]) -> str:
    return " x ".join("any" if size is None else str(size) for size in shape) or "a number"


def _require(fits: bool, parts: Parts, *roles: str) -> None:
    """Raise UnfitError with the shapes of the tensors that do not fit one another."""
    if not fits:
        shapes = ", ".join(f"{role} {_sizes(parts[role].shape)}" for role in roles)
        raise UnfitError(f"its tensors do not fit one another ({shapes})")


def _matrix(tensor: Tensor) -> Tensor:
    """(a, b, k, k) as (a, b k k) in float32; (a, b) stays."""
    return tensor.float().flatten(1)


def _number(tensor: Tensor) -> float:
    return float(tensor.float().reshape(-1)[0])


def scale_of(parts: Parts, rank: int | None) -> float:
    """The factor of dW: `scale`, else alpha / r, else 1.

    `scale` is A1111's. Without alpha all programs take 1; an alpha of 0 is a factor of 0 as in A1111, ComfyUI and
    PEFT, while kohya's sd-scripts and LyCORIS train with alpha = r then.
    """
    if "scale" in parts:
        return _number(parts["scale"])
    if "alpha" in parts and rank is not None:
        return _number(parts["alpha"]) / rank
    return 1.0


def _finished(parts: Parts, delta: Tensor, weight: Tensor, rank: int | None) -> Tensor:
    """Add the tensor `bias`, which is of the weight's shape (A1111), scale in place, and let DoRA take the sum.

    LoHa and LoKr are scaled once, as LyCORIS's forward, A1111 and ComfyUI do; its get_merged_weight does it twice.
    """
    delta = delta.reshape(weight.shape)
    if "bias" in parts:
        delta = delta + parts["bias"].float().reshape(weight.shape)
    delta.mul_(
        scale_of(parts, rank)
    )  # in memory of its own; new memory for each step would take as long as the product
    return dora(parts["dora_scale"].float(), weight, delta) if "dora_scale" in parts else delta


def dora(magnitude: Tensor, weight: Tensor, delta: Tensor) -> Tensor:
    """Change W + dW to given lengths: W' = m (W + dW) / |W + dW|.

    The lengths are those of rows where m is (out, 1, ...) or PEFT's (out,), as in the paper, LyCORIS and PEFT; of
    columns where it is (1, in, 1, ...). A strength s means W + s (W' - W).

    Returns:
        W' - W.

    Raises:
        UnfitError: m is of neither shape.
    """
    shape, dims = _lengths_of(tuple(magnitude.shape), tuple(weight.shape))
    moved = weight + delta
    norm = torch.linalg.vector_norm(moved, dim=dims, keepdim=True)
    return magnitude.reshape(shape) * moved / norm.clamp_min(torch.finfo(norm.dtype).tiny) - weight


def _lengths_of(
    magnitude: tuple[int, ...], weight: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape that lengths have beside a weight, and the dimensions that each is taken over."""
    ones = (1,) * (len(weight) - 1)
    if magnitude in ((weight[0],), (weight[0], 1), (weight[0], *ones)):
        return (weight[0], *ones), tuple(range(1, len(weight)))
    if len(weight) > 1 and magnitude in ((1, weight[1]), (1, weight[1], *ones[1:])):
        return (1, weight[1], *ones[1:]), (0, *range(2, len(weight)))
    raise UnfitError(f"its dora_scale is {_sizes(magnitude)}, the weight {_sizes(weight)}")


# --- LoRA --------------------------------------------------------------------------------------------------------


def lora_delta(parts: Parts, weight: Tensor) -> Tensor:
    """up @ down; with `lora_mid` (r, r, k, k) the convolutions down, mid and up as one (LyCORIS's CP form)."""
    up, down = _matrix(parts["lora_up"]), _matrix(parts["lora_down"])
    if "lora_mid" in parts:
        delta = torch.einsum("nmkl,in,mj->ijkl", parts["lora_mid"].float(), up, down)
    else:
        delta = up @ down
    return _finished(parts, delta, weight, lora_rank(parts))


def lora_rank(parts: Parts) -> int:
    """r: the rows of lora_down."""
    return len(parts["lora_down"])


def lora_sizes(parts: Parts, kernel: int) -> tuple[int, int]:
    """lora_up (out, r, ...) @ lora_down (r, in, k, k), or lora_mid (r, r', k, k) between: (out, in * k * k)."""
    up, down, mid = parts["lora_up"], parts["lora_down"], parts.get("lora_mid")
    _require(up.dim() > 1 and down.dim() > 1, parts, "lora_up", "lora_down")
    rank, columns = len(down), down[0].numel()
    if mid is not None:
        _require(mid.dim() == 4 and mid.shape[1] == rank, parts, "lora_mid", "lora_down")
        columns, rank = columns * math.prod(mid.shape[2:]), len(mid)
    _require(up[0].numel() == rank, parts, "lora_up", "lora_down" if mid is None else "lora_mid")
    return len(up), columns


# --- LoHa --------------------------------------------------------------------------------------------------------


def _tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A core (r, r, k, k) with factors (r, out) and (r, in) as (out, in, k, k); LyCORIS's Tucker form."""
    return torch.einsum("ijkl,ip,jr->prkl", core.float(), _matrix(rows), _matrix(columns))


def loha_delta(parts: Parts, weight: Tensor) -> Tensor:
    """(w1_a @ w1_b) times (w2_a @ w2_b), element by element; with t1 and t2 each is a Tucker product."""
    products = []
    for one in "12":
        a, b, core = parts[f"hada_w{one}_a"], parts[f"hada_w{one}_b"], parts.get(f"hada_t{one}")
        products.append(_matrix(a) @ _matrix(b) if core is None else _tucker(core, a, b))
    return _finished(parts, products[0] * products[1], weight, loha_rank(parts))


def loha_rank(parts: Parts) -> int:
    """r: the rows of w1_b."""
    return len(parts["hada_w1_b"])


def loha_sizes(parts: Parts, kernel: int) -> tuple[int, int]:
    """(out, in * k * k) of both products, w_a (out, r) @ w_b (r, ...), or (r, out), (r, in) and a core (r, r, k, k)."""
    sizes = set()
    roles = tuple(role for role in parts if role.startswith("hada_"))
    _require(("hada_t1" in parts) == ("hada_t2" in parts), parts, *roles)
    for one in "12":
        a, b, core = parts[f"hada_w{one}_a"], parts[f"hada_w{one}_b"], parts.get(f"hada_t{one}")
        _require(a.dim() > 1 and b.dim() > 1, parts, *roles)
        if core is None:
            _require(a[0].numel() == len(b), parts, *roles)
            sizes.add((len(a), b[0].numel()))
        else:
            _require(core.dim() == 4 and core.shape[:2] == (len(a), len(b)), parts, *roles)
            sizes.add((a[0].numel(), b[0].numel() * math.prod(core.shape[2:])))
    _require(len(sizes) == 1, parts, *roles)
    return sizes.pop()


# --- LoKr --------------------------------------------------------------------------------------------------------


def _lokr_half(parts: Parts, one: str) -> Tensor:
    if (whole := parts.get(f"lokr_w{one}")) is not None:
        return whole.float()
    a, b = parts[f"lokr_w{one}_a"], parts[f"lokr_w{one}_b"]
    core = parts.get("lokr_t2") if one == "2" else None
    return a.float() @ b.float() if core is None else _tucker(core, a, b)


def lokr_delta(parts: Parts, weight: Tensor) -> Tensor:
    """The Kronecker product of w1 and w2, each whole or as a product; alpha counts only if one is a product."""
    first, second = _matrix(_lokr_half(parts, "1")), _matrix(_lokr_half(parts, "2"))
    # Not torch.kron, which fails on the strides of some convolutions of 1 x 1.
    product = first[:, None, :, None] * second[None, :, None, :]
    return _finished(parts, product, weight, lokr_rank(parts))


def lokr_rank(parts: Parts) -> int | None:
    """The rank of w2's product, else of w1's, as A1111 and ComfyUI have it; None where both are whole."""
    return next((len(parts[role]) for role in ("lokr_w2_b", "lokr_w1_b") if role in parts), None)


def lokr_sizes(parts: Parts, kernel: int) -> tuple[int, int]:
    """The product of the sizes of w1 and w2, each whole or of w_a and w_b: (out, in * k * k)."""
    roles = tuple(role for role in parts if role.startswith("lokr_"))
    shapes = []
    for one in "12":
        whole, a, b = (parts.get(f"lokr_w{one}{end}") for end in ("", "_a", "_b"))
        if (whole is None) == (a is None) or (a is None) != (b is None):
            raise UnfitError(f"it needs w{one}, or w{one}_a and w{one}_b, and has {', '.join(sorted(roles))}")
        core = parts.get("lokr_t2") if one == "2" else None
        _require(core is None or whole is None, parts, *roles)
        if whole is not None:
            _require(whole.dim() in (2, 4) if one == "2" else whole.dim() == 2, parts, *roles)
            shapes.append((len(whole), whole[0].numel()))
            continue
        _require(a.dim() == 2 and b.dim() == 2, parts, *roles)
        if core is None:
            _require(a.shape[1] == len(b), parts, *roles)
            shapes.append((len(a), b.shape[1]))
        else:
            _require(core.dim() == 4 and core.shape[:2] == (len(a), len(b)), parts, *roles)
            shapes.append((a.shape[1], b.shape[1] * math.prod(core.shape[2:])))
    return shapes[0][0] * shapes[1][0], shapes[0][1] * shapes[1][1]


# --- whole differences ----------------------------------------------------------------------------------------------


def full_delta(parts: Parts, weight: Tensor) -> Tensor:
    """The difference itself."""
    return parts["diff"].float().reshape(weight.shape) * scale_of(parts, None)


def full_sizes(parts: Parts, kernel: int) -> tuple[int, int]:
    """(out, in * k * k) of the difference itself; a vector of n is (n, 1)."""
    diff = parts["diff"]
    return (len(diff), diff[0].numel()) if diff.dim() else (1, 1)


def norm_delta(parts: Parts, weight: Tensor) -> Tensor:
    """The difference of a norm's scale (LyCORIS); ComfyUI and LyCORIS do without one for its shift."""
    return parts["w_norm"].float().reshape(weight.shape) if "w_norm" in parts else torch.zeros_like(weight)


def norm_sizes(parts: Parts, kernel: int) -> tuple[int | None, int | None]:
    """(c, 1) of w_norm (c,); nothing where the file has none."""
    return (parts["w_norm"].numel(), 1) if "w_norm" in parts else (None, None)


def nothing(parts: Parts, weight: Tensor) -> Tensor:
    """No change of the weight, where a file changes the bias alone (ComfyUI)."""
    return torch.zeros_like(weight)


def no_sizes(parts: Parts, kernel: int) -> tuple[None, None]:
    """Nothing is said of the weight."""
    return None, None


# --- GLoRA, IA3 --------------------------------------------------------------------------------------------------


def _glora_layouts(parts: Parts) -> dict[str, tuple[int, int, int]]:
    """Layouts that the shapes allow: name -> (out, in, r); on a square weight both may look possible but for W."""
    shapes = {role: tuple(_matrix(parts[role]).shape) for role in ("a1", "a2", "b1", "b2")}
    (rows, rank), (_, columns) = shapes["b1"], shapes["b2"]
    found = {}
    if shapes == {"a1": (columns, rank), "a2": (rank, columns), "b1": (rows, rank), "b2": (rank, columns)}:
        found["new"] = (rows, columns, rank)
    (rows, rank), (_, columns) = shapes["b2"], shapes["b1"]
    if shapes == {"a1": (rank, columns), "a2": (columns, rank), "b1": (rank, columns), "b2": (rows, rank)}:
        found["old"] = (rows, columns, rank)
    return found


def _glora_layout(parts: Parts, shape: tuple[int, ...]) -> tuple[str, int]:
    """The layout for a weight of this shape, and r."""
    for layout, (rows, columns, rank) in _glora_layouts(parts).items():
        if (rows, columns) == (shape[0], math.prod(shape[1:])):
            return layout, rank
    raise UnfitError(f"its tensors are not for a weight of {_sizes(shape)}")


def glora_delta(parts: Parts, weight: Tensor) -> Tensor:
    """W A + B, times alpha / r: A = a1 @ a2 and B = b1 @ b2 in LyCORIS's layout, the other way round in the older one.

    As ComfyUI, which reads both; A1111 reads the older and leaves alpha out.
    """
    layout, rank = _glora_layout(parts, tuple(weight.shape))
    a1, a2, b1, b2 = (_matrix(parts[role]) for role in ("a1", "a2", "b1", "b2"))
    a, b = (a1 @ a2, b1 @ b2) if layout == "new" else (a2 @ a1, b2 @ b1)
    return _finished(parts, _matrix(weight) @ a + b, weight, rank)


def glora_sizes(parts: Parts, kernel: int) -> tuple[None, None]:
    """Nothing: which side is which, the weight alone tells; two layouts of a1, a2, b1, b2 are held to be possible."""
    roles = ("a1", "a2", "b1", "b2")
    _require(all(parts[role].dim() > 1 for role in roles) and bool(_glora_layouts(parts)), parts, *roles)
    return None, None


def ia3_delta(parts: Parts, weight: Tensor) -> Tensor:
    """W times a factor for each column (on_input) or row, as A1111; a row's or channel's of convolutions likewise."""
    factor = parts["weight"].float().reshape(-1, *(1,) * (weight.dim() - 1))
    return weight * (factor.transpose(0, 1) if weight.dim() > 1 and _number(parts["on_input"]) else factor)


def ia3_sizes(parts: Parts, kernel: int) -> tuple[int | None, int | None]:
    """One factor for each column or, without on_input, for each row."""
    count = parts["weight"].numel()
    return (None, count * kernel) if _number(parts["on_input"]) else (count, None)


# --- OFT ---------------------------------------------------------------------------------------------------------


def _rotations(blocks: Tensor, constraint: float) -> Tensor:
    """Cayley's transform (I + Q)(I - Q)^-1 of Q = blocks - blocks^T, (..., b, b), |Q| being constrained where > 0."""
    skew = blocks - blocks.transpose(-1, -2)
    if constraint > 0:
        norm = torch.linalg.vector_norm(skew)
        skew = skew * ((norm.clamp(max=constraint) + 1e-8) / (norm + 1e-8))
    one = torch.eye(skew.shape[-1], device=skew.device)
    return torch.linalg.solve(one - skew, one + skew, left=False)


def _rescaled(parts: Parts, turned: Tensor, weight: Tensor) -> Tensor:
    if "rescale" in parts:
        turned = parts["rescale"].float().reshape(-1, *(1,) * (weight.dim() - 1)) * turned
    return turned - weight


def _constraint(parts: Parts, rows: int) -> float:
    """alpha times the number of rows, as kohya's sd-scripts, LyCORIS and A1111; ComfyUI leaves the rows out."""
    return _number(parts["alpha"]) * rows if "alpha" in parts else 0.0


def oft_delta(parts: Parts, weight: Tensor) -> Tensor:
    """Turn the rows of W block by block: R^T W; `rescale` multiplies the rows then. The strength counts once."""
    rotations = _rotations(parts["oft_blocks"].float(), _constraint(parts, len(weight)))
    return _turn(parts, rotations, weight)


def oft_diag_delta(parts: Parts, weight: Tensor) -> Tensor:
    """The same by older files of LyCORIS, whose blocks are the rotations themselves (A1111)."""
    return _turn(parts, parts["oft_diag"].float(), weight)


def _turn(parts: Parts, rotations: Tensor, weight: Tensor) -> Tensor:
    blocks = _matrix(weight).reshape(*rotations.shape[:2], -1)
    return _rescaled(parts, (rotations.transpose(1, 2) @ blocks).reshape(weight.shape), weight)


def boft_delta(parts: Parts, weight: Tensor) -> Tensor:
    """Turn the rows by m butterfly factors in turn, (m, blocks, b, b): BOFT's eq. 3, as LyCORIS orders the rows."""
    rotations = _rotations(parts["oft_blocks"].float(), _constraint(parts, len(weight)))
    count, size = rotations.shape[1:3]
    turned = _matrix(weight)
    for level, rotation in enumerate(rotations):
        # Rows (c, 2, k) become (c, k, 2), so that those a butterfly joins lie side by side; and back.
        step = 2**level * (size // 2)
        order = torch.arange(len(turned), device=turned.device).reshape(-1, 2, step).transpose(1, 2).flatten()
        mixed = rotation @ turned[order].reshape(count, size, -1)
        turned = torch.empty_like(turned).index_copy_(0, order, mixed.reshape(turned.shape))
    return _rescaled(parts, turned.reshape(weight.shape), weight)


def _block_sizes(parts: Parts, role: str, dims: int) -> tuple[int, None]:
    blocks = parts[role]
    _require(blocks.dim() == dims and blocks.shape[-1] == blocks.shape[-2], parts, role)
    rows = blocks.shape[-3] * blocks.shape[-2]
    if "rescale" in parts:
        _require(parts["rescale"].numel() == rows, parts, role, "rescale")
    return rows, None


def oft_sizes(parts: Parts, kernel: int) -> tuple[int, None]:
    """The rows (n * size) that oft_blocks (n, size, size) turn."""
    return _block_sizes(parts, "oft_blocks", 3)


def oft_diag_sizes(parts: Parts, kernel: int) -> tuple[int, None]:
    """The rows (n * size) that oft_diag (n, size, size) turn."""
    return _block_sizes(parts, "oft_diag", 3)


def boft_sizes(parts: Parts, kernel: int) -> tuple[int, None]:
    """The rows (n * size) that oft_blocks (levels, n, size, size) turn."""
    rows, _ = _block_sizes(parts, "oft_blocks", 4)
    levels, _, size, _ = parts["oft_blocks"].shape
    _require(size % 2 == 0 and rows % (2 ** (levels - 1) * size) == 0, parts, "oft_blocks")
    return rows, None


# --- the table ---------------------------------------------------------------------------------------------------


def _roles(words: str) -> frozenset[str]:
    return frozenset(words.split())


_SCALES = "alpha scale"
_SUMMED = f"{_SCALES} bias dora_scale diff_b"
LORA = Family(
    "LoRA", _roles("lora_up lora_down"), _roles(f"{_SUMMED} lora_mid"), lora_delta, lora_sizes, lora_rank
)
LOHA = Family(
    "LoHa",
    _roles("hada_w1_a hada_w1_b hada_w2_a hada_w2_b"),
    _roles(f"{_SUMMED} hada_t1 hada_t2"),
    loha_delta,
    loha_sizes,
    loha_rank,
)
_HALVES = "lokr_w1 lokr_w1_a lokr_w1_b lokr_w2 lokr_w2_a lokr_w2_b lokr_t2"
LOKR = Family(
    "LoKr", frozenset(), _roles(f"{_SUMMED} {_HALVES}"), lokr_delta, lokr_sizes, lokr_rank, _roles(_HALVES)
)
GLORA = Family("GLoRA", _roles("a1 a2 b1 b2"), _roles(_SUMMED), glora_delta, glora_sizes)
IA3 = Family("IA3", _roles("weight on_input"), frozenset(), ia3_delta, ia3_sizes)
OFT = Family("OFT", _roles("oft_blocks"), _roles("alpha rescale"), oft_delta, oft_sizes)
BOFT = Family("BOFT", _roles("oft_blocks"), _roles("alpha rescale"), boft_delta, boft_sizes)
# Its alpha is there and counts for nothing (A1111).
OFT_DIAG = Family("OFT", _roles("oft_diag"), _roles("alpha rescale"), oft_diag_delta, oft_diag_sizes)
FULL = Family("full", _roles("diff"), _roles("diff_b alpha scale"), full_delta, full_sizes)
NORM = Family(
    "norm", frozenset(), _roles("w_norm b_norm"), norm_delta, norm_sizes, one_of=_roles("w_norm b_norm")
)
BIAS = Family("bias", _roles("diff_b"), frozenset(), nothing, no_sizes)
FAMILIES = (LORA, LOHA, LOKR, GLORA, IA3, OFT, OFT_DIAG, FULL, NORM, BIAS)


def family_of(parts: Parts) -> Family:
    """Tell the family of a module's tensors by their roles.

    Raises:
        UnfitError: they are none's, or not all that it needs, or do not fit one another.
    """
    roles = set(parts)
    family = next((one for one in FAMILIES if one.takes(roles)), None)
    if family is None:
        raise UnfitError(f"it has {', '.join(sorted(roles))}, which is no known way to change a weight")
    if family is OFT and parts["oft_blocks"].dim() == 4:
        family = BOFT
    family.sizes(parts, 1)
    return family


OF_BIAS = ("diff_b", "b_norm")


def bias_delta(parts: Parts) -> Tensor | None:
    """The change of the module's bias, `diff_b` or `b_norm` (out,), in float32; None if there is none."""
    return next((parts[role].float() for role in OF_BIAS if role in parts), None)


def changes_weight(family: Family, parts: Parts) -> bool:
    """Whether there is a change of the weight, and not of the bias alone."""
    return family is not BIAS and (family is not NORM or "w_norm" in parts)


def is_stopped(family: Family, parts: Parts) -> bool:
    """Whether an alpha of 0 keeps the change from having any effect."""
    scaled = family is GLORA or family.rank(parts) is not None
    return scaled and "scale" not in parts and "alpha" in parts and _number(parts["alpha"]) == 0


def _plain_shape(shape: tuple[int, ...], columns: int | None) -> tuple[int, ...]:
    """The shape of the part of a weight that the change is for: all of it, or its first 4 of 9 input channels."""
    kernel = math.prod(shape[2:])
    if len(shape) == 4 and shape[1] == INPAINTING_CHANNELS and columns == PLAIN_CHANNELS * kernel:
        return shape[0], PLAIN_CHANNELS, *shape[2:]
    return shape


def check_fit(family: Family, parts: Parts, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Hold the parts against the shape of the weight that they are to change.

    An inpainting model's first convolution has 9 input channels, of which the first 4 are the plain model's: changes
    made for those leave the others alone (A1111).

    Returns:
        The shape of what changes: the weight's, or that of its first 4 input channels.

    Raises:
        UnfitError: they are for a weight of another shape.
    """
    if len(shape) < 2 and family not in (FULL, NORM, IA3):
        raise UnfitError(f"{family.name} is for matrices and convolutions, not a weight of {_sizes(shape)}")
    rows, columns = family.sizes(parts, math.prod(shape[2:]))
    shape = _plain_shape(shape, columns)
    if rows not in (None, shape[0]) or columns not in (None, math.prod(shape[1:])):
        wanted = _sizes((shape[0], math.prod(shape[1:])))
        raise UnfitError(f"it is for a weight of {_sizes((rows, columns))}, not {wanted}")
    if family is GLORA:
        _glora_layout(parts, shape)
    if "dora_scale" in parts:
        _lengths_of(tuple(parts["dora_scale"].shape), shape)
    if "bias" in parts and parts["bias"].numel() != math.prod(shape):
        raise UnfitError(f"its bias is {_sizes(parts['bias'].shape)}, the weight {_sizes(shape)}")
    return shape


def weight_delta(family: Family, parts: Parts, weight: Tensor) -> Tensor:
    """dW at strength 1, of W's shape.

    Args:
        weight: W, float32.

    Raises:
        UnfitError: the parts are for a weight of another shape.
    """
    shape = check_fit(family, parts, tuple(weight.shape))
    parts = {role: part.to(weight.device) for role, part in parts.items()}
    if shape == tuple(weight.shape):
        return family.delta(parts, weight)
    delta = torch.zeros_like(weight)
    delta[:, :PLAIN_CHANNELS] = family.delta(parts, weight[:, :PLAIN_CHANNELS])
    return delta
