"""Laws over all pairs of what can be attached: none at strength 0, the two composed by hand, no trace, and graphs.

Pictures are small and each kind's model by hand is made once, so that a pair costs a fifth of a second of one core.
"""

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from keyed import fill, keyed_input, weight
from pretended_device import pretended
from tiny import tiny_config
from torch import nn

from ldm.adapters import (
    PAG,
    SAG,
    AttentionSlicing,
    ControlNet,
    DeepCache,
    Embedding,
    FreeU,
    IPAdapter,
    LoRA,
    MutualSelfAttention,
    PlugAndPlay,
    PromptToPrompt,
    SeamlessTiling,
    T2IAdapter,
    TokenMerging,
    WordMaps,
)
from ldm.adapters.controlnet import ControlNetFile
from ldm.adapters.freeu import scale_low_frequencies
from ldm.adapters.ip_adapter_file import IPAdapterFile
from ldm.adapters.lora import LoraFile
from ldm.adapters.t2i_adapter import T2IAdapterFile
from ldm.checkpoints import save_safetensors
from ldm.config import instantiate_from_config
from ldm.kernels import cpu, cuda_graphs, optimize, restore
from ldm.modules import seams
from ldm.modules.diffusionmodules.controlnet import ControlNetModel
from ldm.modules.processors import AttnProcessor, IPAttnProcessor, named_attentions
from ldm.modules.seams import attached
from ldm.pipeline import StableDiffusion

CPU = torch.device("cpu")
NEAR = 2e-5  # of the largest number, where one of the two computes otherwise
WORDS = "one two three"  # a token each
HINT = (0.3 * keyed_input("pairs.hint", (3, 64, 64)) + 0.5).clamp(0, 1)
EMBEDS = keyed_input("pairs.embeds", (1, 20))  # of a picture


def build():
    config = tiny_config()["model"]
    config["params"]["use_ema"] = True
    model = fill(instantiate_from_config(config), only=("model.", "first_stage_model.", "cond_stage_model."))
    for name, shadow in model.model_ema.m_name2s_name.items():
        weight = model.model.get_parameter(name).detach()
        getattr(model.model_ema, shadow).copy_(weight * (1.05 if "weight" in name else 0.9))
    model.use_ema = False  # it paints where the average is one of the pair
    return model


@pytest.fixture(scope="module")
def model():
    return build()


class Files(dict):
    """Files by their names, made when they are first asked for: half of the kinds' are not small."""

    def __init__(self, model, folder):
        super().__init__()
        self.model, self.folder, self._read = model, folder, {}

    def read(self, name, kind):
        """A file that has been read, once for all."""
        if name not in self._read:
            self._read[name] = kind(self[name])
        return self._read[name]

    def __missing__(self, name):
        if name in ("control", "t2i", "image"):
            unet = self.model.model.diffusion_model
            tensors = {"control": control_tensors, "t2i": t2i_tensors, "image": image_tensors}[name](unet)
            self[name] = self.folder / f"{name}.safetensors"
            save_safetensors(self[name], tensors, {})
        else:
            self |= small_files(self.model, self.folder)
        return self[name]


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    return Files(model, tmp_path_factory.mktemp("pairs"))


def control_tensors(unet):
    with torch.device("meta"):
        network = ControlNetModel(
            4, 32, 3, 1, [1, 2], channel_mult=(1, 2), num_heads=4, context_dim=128
        )  # as the UNet's way down
    return {name: weight(f"pairs.control.{name}", tuple(x.shape)) for name, x in network.state_dict().items()}


def t2i_tensors(unet):
    shapes, before = {"conv_in.weight": (32, 192, 3, 3), "conv_in.bias": (32,)}, 32
    for i, width in enumerate((32, 32, 64, 64)):
        if before != width:
            shapes |= {f"body.{i}.in_conv.weight": (width, before, 1, 1), f"body.{i}.in_conv.bias": (width,)}
        shapes |= {f"body.{i}.block1.weight": (width, width, 3, 3), f"body.{i}.block1.bias": (width,)}
        shapes |= {f"body.{i}.block2.weight": (width, width, 1, 1), f"body.{i}.block2.bias": (width,)}
        before = width
    return {name: weight(f"pairs.t2i.{name}", shape) for name, shape in shapes.items()}


def image_tensors(unet):
    shapes = {"proj.weight": (384, 20), "proj.bias": (384,), "norm.weight": (128,), "norm.bias": (128,)}
    tensors = {f"image_proj.{name}": weight(f"pairs.image.{name}", shape) for name, shape in shapes.items()}
    for i, one in enumerate(named_attentions(unet).values()):
        if i % 2:
            for part in "kv":
                name = f"ip_adapter.{i}.to_{part}_ip.weight"
                tensors[name] = weight(f"pairs.{name}", tuple(one.to_k.weight.shape))
    return tensors


def small_files(model, folder):
    """A LoRA, one with convolutions, one with magnitudes, and an embedding."""
    written = {"lora": {}, "locon": {}, "dora": {}}
    for name, layer in model.named_modules():
        short = name.replace("model.diffusion_model.", "lora_unet_").replace(".", "_")
        if "cond_stage_model" in name:
            short = "lora_te_text_model_" + name[name.find("encoder.layers") :].replace(".", "_")
        if isinstance(layer, nn.Linear) and name.endswith(("to_q", "ff.net.2", "q_proj")):
            kinds = ["lora"]
        elif isinstance(layer, nn.Linear) and name.endswith(("to_v", "v_proj")):
            kinds = ["lora", "dora"]
        elif (
            isinstance(layer, nn.Conv2d)
            and name.startswith("model.")
            and name.endswith(("in_layers.2", "op"))
        ):
            kinds = ["locon"]
        else:
            continue
        shape = layer.weight.shape
        for kind in kinds:
            tensors, made = written[kind], f"pairs.{kind}.{name}"
            tensors[f"{short}.lora_up.weight"] = 0.3 * keyed_input(
                made, (shape[0], 3) + (1, 1) * (len(shape) == 4)
            )
            tensors[f"{short}.lora_down.weight"] = 0.3 * keyed_input(made + "2", (3, *shape[1:]))
            tensors[f"{short}.alpha"] = torch.tensor(2.0)
            if kind == "dora":
                tensors[f"{short}.dora_scale"] = 0.5 + keyed_input(made + "3", (shape[0], 1)).abs()
    for kind, tensors in written.items():
        save_safetensors(folder / f"{kind}.safetensors", tensors, {})
    save_safetensors(folder / "birb.safetensors", {"emb_params": keyed_input("pairs.birb", (3, 128))}, {})
    return {name: folder / f"{name}.safetensors" for name in (*written, "birb")}


# --- the kinds: how each is attached, how it is done by hand, and what of it is nothing ---


class Kind:
    """Nothing: what a kind does not say of itself.

    Attributes:
        adapters: for `adapters=`.
        ways: options of optimize(), None where it is not wanted.
        prompt: where the words differ.
        slack: of the largest number, between what it computes and the plain code.
        is_same: it paints what is painted without it.
    """

    slack = 0.0
    ways = None
    known = True
    is_same = False

    def __init__(self, files):
        self.files = files
        self.adapters = self.make(1.0)
        self.nothing = self.make(0.0)

    def make(self, strength):
        return []

    @contextlib.contextmanager
    def on(self, model, strength=1.0):
        """What is attached besides adapters."""
        yield

    def by_hand(self, model):
        """Do it otherwise than by what is tested: change a model for good, or give options of `paint`."""
        raise NotImplementedError


class Average(Kind):
    @contextlib.contextmanager
    def on(self, model, strength=1.0):
        average = model.model_ema
        kept = {name: x.clone() for name, x in average.state_dict().items()}
        if not strength:
            average.copy_from(model.model)
        model.use_ema = True
        yield
        model.use_ema = False
        if not strength:
            average.load_state_dict(kept)

    def by_hand(self, model):
        model.model_ema.copy_to(model.model)


class Lora(Kind):
    file = "lora"

    def make(self, strength):
        return [LoRA(self.files.read(self.file, LoraFile), 0.8 * strength)]

    def by_hand(self, model):
        with torch.no_grad():
            for name, change in self.adapters[0].deltas(model).items():
                weight = model.get_parameter(name)
                weight.copy_(change(weight))


class Locon(Lora):
    file = "locon"


class Dora(Lora):
    file = "dora"


class OwnProcessor(Kind):
    known = False

    @staticmethod
    def theirs(attn, x, encoder_hidden_states=None, attention_mask=None):
        return 0.9 * AttnProcessor()(attn, x, encoder_hidden_states, attention_mask)

    @contextlib.contextmanager
    def on(self, model, strength=1.0):
        attn = list(named_attentions(model.model.diffusion_model).values())[0]
        attn.set_processor(self.theirs if strength else AttnProcessor())
        yield
        attn.set_processor(None)

    def by_hand(self, model):
        attn = list(named_attentions(model.model.diffusion_model).values())[0]
        attn.register_forward_hook(lambda module, given, out: 0.9 * out)


class ImagePrompt(Kind):
    """The last of the text's tokens stand for an image's."""

    def __init__(self, files):
        super().__init__(files)
        self.processor = fill(IPAttnProcessor(32, 128, scale=0.7, num_tokens=3), "pairs.ip.")

    @staticmethod
    def attention(model):
        return list(named_attentions(model.model.diffusion_model).values())[1]

    @contextlib.contextmanager
    def on(self, model, strength=1.0):
        if strength:
            self.attention(model).set_processor(self.processor)
        yield
        self.attention(model).set_processor(None)

    def by_hand(self, model):
        attn = self.attention(model)
        mine = copy.deepcopy(self.processor)

        def forward(x, context=None, mask=None):
            text, image = context[:, :-3], context[:, -3:]
            split = [y.unflatten(2, (attn.heads, -1)).transpose(1, 2) for y in
                     (attn.to_q(x), attn.to_k(text), attn.to_v(text), mine.to_k_ip(image), mine.to_v_ip(image))
            ]  # fmt: skip
            q, k, v, k_image, v_image = split
            sdpa = nn.functional.scaled_dot_product_attention
            out = sdpa(q, k, v) + 0.7 * sdpa(q, k_image, v_image)
            return attn.to_out(out.transpose(1, 2).flatten(2))

        attn.forward = forward


class Hook(Kind):
    known = False

    @contextlib.contextmanager
    def on(self, model, strength=1.0):
        part = model.model.diffusion_model.middle_block[0]
        handle = part.register_forward_hook(lambda module, given, out: 1.1 * out if strength else None)
        yield
        handle.remove()

    def by_hand(self, model):
        unet = model.model.diffusion_model
        own = unet.middle_block[0]

        class Scaled(type(own)):
            def forward(self, x, emb):
                return 1.1 * super().forward(x, emb)

        own.__class__ = Scaled


class Word(Kind):
    prompt = "a birb"

    def make(self, strength):
        return (
            [Embedding(self.files["birb"], width=128, token=None if strength else "unsaid")]
            if strength
            else []
        )

    def by_hand(self, model):
        encoder = model.cond_stage_model
        table = next(m for name, m in encoder.named_modules() if name.endswith("token_embedding"))
        ids = encoder.tokenizer(WORDS, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            table.weight[ids] = self.adapters[0].vectors
        return {"prompt": f"a {WORDS}"}


class Merged(Kind):
    def make(self, strength):
        return [TokenMerging(0.5 * strength)]

    def by_hand(self, model):
        return {"merge_ratio": 0.5}


class Cached(Kind):
    def make(self, strength):
        return [DeepCache(2 if strength else 1)]

    def by_hand(self, model):
        return {"cache_interval": 2}


class Control(Kind):
    slack = NEAR

    def make(self, strength):
        return [ControlNet(self.files.read("control", ControlNetFile), HINT, 0.6 * strength)]

    def by_hand(self, model):
        network, unet = (
            self.adapters[0].file.network(model.model.diffusion_model),
            model.model.diffusion_model,
        )

        def before(module, given, options):
            x, t, context = (*given, options.get("context"))[:3]
            maps = network(x, HINT.expand(len(x), -1, -1, -1), t, context)
            return given, options | {"control": [0.6 * one for one in maps]}

        unet.register_forward_pre_hook(before, with_kwargs=True)


class Sketch(Kind):
    """A T2I-Adapter, by hooks on the blocks themselves."""

    slack = NEAR

    def make(self, strength):
        return [T2IAdapter(self.files.read("t2i", T2IAdapterFile), HINT, 0.6 * strength)]

    def by_hand(self, model):
        unet = model.model.diffusion_model
        with torch.no_grad():
            maps = self.adapters[0].file.network(unet)(HINT[None])
        for place, one in zip((1, 3), maps, strict=True):
            unet.input_blocks[place].register_forward_hook(lambda m, given, out, one=one: out + 0.6 * one)


class Free(Kind):
    """FreeU, by hooks on the blocks of the way up."""

    slack = NEAR

    def make(self, strength):
        return [FreeU(1.5, 1.6, 0.9, 0.2) if strength else FreeU(1, 1, 1, 1)]

    def by_hand(self, model):
        unet = model.model.diffusion_model
        # What comes from below, before it is joined with a skip.
        for place, (width, backbone, low) in enumerate(
            ((64, 1.5, 0.9), (64, 1.5, 0.9), (64, 1.6, 0.2), (32, 1.6, 0.2))
        ):

            def joined(module, given, width=width, backbone=backbone, low=low):
                h, skip = given[0][:, :width].clone(), given[0][:, width:]
                h[:, : width // 2] *= backbone
                return torch.cat([h, scale_low_frequencies(skip, low)], dim=1), *given[1:]

            unet.output_blocks[place].register_forward_pre_hook(joined)


class Perturbed(Kind):
    """Perturbed-attention guidance, by calling the UNet once more within a hook on it."""

    slack = NEAR

    def make(self, strength):
        return [PAG(2.0 * strength)]

    def by_hand(self, model):
        unet, inner = model.model.diffusion_model, []
        attn = unet.middle_block[1].transformer_blocks[0].attn1

        def identity(module, given, out):
            return module.to_out(module.to_v(given[0])) if inner else None

        def more(module, given, options, out):
            if inner:
                return None
            inner.append(attn.register_forward_hook(identity))
            other = module(*given, **options)
            inner.pop().remove()
            return out + 2.0 * (out[1:] - other[1:])

        unet.register_forward_hook(more, with_kwargs=True)


class Sliced(Kind):
    slack = NEAR
    is_same = True

    def make(self, strength):
        return [AttentionSlicing(2)] if strength else []

    def by_hand(self, model):
        """The same."""


class Seamless(Kind):
    slack = NEAR

    def make(self, strength):
        return [SeamlessTiling(bool(strength), bool(strength))]

    def by_hand(self, model):
        for conv in model.modules():
            if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1):
                conv.padding_mode = "circular"


class Blurred(Kind):
    """Self-attention guidance. It has its numbers from tests of its own."""

    slack = NEAR

    def make(self, strength):
        return [SAG(0.75 * strength)]


class Watched(Kind):
    """Maps of words, which are looked at and change nothing."""

    slack = NEAR
    is_same = True

    def make(self, strength):
        return [WordMaps()] if strength else []

    def by_hand(self, model):
        """The same."""


class Look(Kind):
    """An IP-Adapter. It comes last: by hand it would be what ImagePrompt is."""

    slack = NEAR

    def make(self, strength):
        return [IPAdapter(self.files.read("image", IPAdapterFile), scale=0.7 * strength, embeds=EMBEDS)]


class Optimized(Kind):
    ways = {}
    is_same = True
    slack = NEAR

    def by_hand(self, model):
        optimize(model, **self.ways)


class Tiled(Optimized):
    ways = {"tiled_vae": True}


class Offloaded(Optimized):
    ways = {"low_vram": CPU}
    slack = 0.0


KINDS = [
    Average,
    Lora,
    Locon,
    Dora,
    OwnProcessor,
    ImagePrompt,
    Hook,
    Word,
    Merged,
    Cached,
    Optimized,
    Tiled,
    Offloaded,
    Control,
    Sketch,
    Free,
    Perturbed,
    Sliced,
    Seamless,
    Blurred,
    Watched,
    Look,
]
ADDING = (Control, Sketch, Look)
FURTHER = (Free, Perturbed, Sliced, Seamless, Blurred, Watched)
# The first by hand changes what the second begins with, or is not done by hand.
NOT_BY_HAND = ((Perturbed, Blurred), (Blurred, Watched), (Blurred, Look))
# Two that set processors, and one that looks into what another answers by itself: refused by name.
REFUSED = ((ImagePrompt, Look), (OwnProcessor, Watched))
PAIRS = [pair for pair in itertools.combinations(KINDS, 2) if pair not in REFUSED]
NAMES = [f"{a.__name__}-{b.__name__}" for a, b in PAIRS]


# --- asking, and looking for traces ---


def paint(model, adapters=(), prompt="a birb", **options):
    """What a model says of a prompt in two guided steps, and the picture of it."""
    given = {
        "seed": 5,
        "steps": 2,
        "sampler": "ddim",
        "guidance_scale": 3.0,
        "output_type": "pt",
        "width": 64,
        "height": 64,
    }
    return StableDiffusion(model).txt2img(prompt, adapters=list(adapters), **given | options).images


@contextlib.contextmanager
def on(model, *kinds, strength=1.0):
    """Attach kinds in their order; gives their adapters."""
    with contextlib.ExitStack() as stack:
        ways = {}
        for kind in kinds:
            ways |= kind.ways or {}
        if strength and any(kind.ways is not None for kind in kinds):
            optimize(model, **ways)
            stack.callback(restore, model)
        for kind in kinds:
            stack.enter_context(kind.on(model, strength))
        yield [one for kind in kinds for one in (kind.adapters if strength else kind.nothing)]


def trace_of(model):
    """Every weight's object, and all that every module holds, but for what the average and the decoder note down."""
    noted = {"_changes", "_shadows", "last_z_shape"}
    held = [
        {k: dict(v) if v and isinstance(v, dict) else v for k, v in vars(m).items() if k not in noted}
        for m in model.modules()
    ]
    return {name: (id(p), p._version) for name, p in model.named_parameters()}, held


def near(got, want, slack):
    return torch.equal(got, want) if not slack else (got - want).abs().max() <= slack * want.abs().max()


@pytest.fixture(scope="module")
def alone(model, files):
    """What each kind paints by itself, asked once."""
    known = {}

    def of(kind):
        if isinstance(kind, nn.Module):  # an optimized model by itself, in one step
            if kind not in known:
                known[kind] = paint(kind, steps=1)
        elif kind not in known:
            with on(model, *([] if kind is None else [kind(files)])) as adapters:
                known[kind] = paint(model, adapters)
        return known[kind]

    return of


@pytest.mark.thinned(4)
@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_changes_what_is_painted_or_how(kind, alone):
    difference = (alone(kind) - alone(None)).abs().max()
    if kind.is_same:
        assert difference <= kind.slack * alone(None).abs().max()
    else:
        assert difference > 1e-4


@pytest.mark.thinned(4)
@pytest.mark.parametrize("first", [kind for kind in KINDS if not kind.is_same and kind is not ImagePrompt])
def test_nothing_of_a_kind_is_nothing_bit_for_bit(first, model, files, alone):
    one = first(files)
    with on(model, one, strength=0.0) as adapters:
        assert torch.equal(paint(model, adapters), alone(None))


@pytest.fixture(scope="module")
def by_hand(model, files):
    """A model with a kind done by hand, made once, and the options of paint that belong to it."""
    made = {}

    def of(kind, *others):
        if (kind, *others) not in made:
            hand, options = copy.deepcopy(model), {}
            for one in (kind, *others):
                options |= one(files).by_hand(hand) or {}
            made[kind, *others] = hand, options
        return made[kind, *others]

    return of


@pytest.fixture(scope="module")
def traces(model, optimized):
    """What both models hold before anything was attached."""
    return {one: trace_of(one) for one in (model, optimized)}


@pytest.fixture(scope="module")
def optimized(model):
    made = optimize(copy.deepcopy(model))
    yield made
    restore(made)


def commutes(*kinds):
    """Whether their order changes no more than rounding: DoRA takes the lengths of what it finds."""
    return sum(issubclass(kind, Lora | Average) for kind in kinds) < 2


@pytest.mark.thinned(100)
@pytest.mark.parametrize(("first", "second"), PAIRS, ids=NAMES)
def test_two_together_are_one_by_hand_and_the_other_attached_and_leave_no_trace(
    first, second, model, optimized, traces, files, alone, by_hand
):
    """Plain, in both orders, and on an optimized model, which is as it was afterwards, its packed weights too."""
    a, b = first(files), second(files)
    with on(model, a, b) as adapters:
        got = paint(model, adapters)
    assert trace_of(model) == traces[model]
    has_ways = issubclass(first, Optimized) or issubclass(second, Optimized)
    other = model if has_ways else optimized
    order = (b, a) if commutes(first, second) else (a, b)
    with on(other, *order) as adapters:
        assert near(paint(other, adapters), got, NEAR)
    assert trace_of(other) == traces[other]
    if not has_ways:
        assert torch.equal(paint(optimized, steps=1), alone(optimized))

    if (first, second) in NOT_BY_HAND:
        return
    if issubclass(first, Optimized) and issubclass(second, Optimized):
        hand = copy.deepcopy(model)  # which is restored, and then by hand no longer
        options = a.by_hand(hand) or {}
    else:
        hand, options = by_hand(first)
    with on(hand, b) as adapters:
        want = paint(hand, adapters, **options)
    slack = max(a.slack, b.slack) or (NEAR if ImagePrompt in (first, second) else 0.0)
    assert near(got, want, slack)


def test_a_lora_a_controlnet_and_an_ip_adapter_together(model, optimized, traces, files, alone, by_hand):
    """In any order the same, plain and optimized, and what the first two done by hand give with the third."""
    kinds = [kind(files) for kind in (Lora, Control, Look)]
    hand, options = by_hand(Lora, Control)
    with on(hand, kinds[2]) as adapters:
        want = paint(hand, adapters, **options)
    for order, one in ((kinds, model), (kinds[1:] + kinds[:1], optimized), (kinds[::-1], optimized)):
        with on(one, *order) as adapters:
            assert near(paint(one, adapters), want, NEAR)
        assert trace_of(one) == traces[one]
    assert torch.equal(paint(optimized, steps=1), alone(optimized)) and torch.equal(paint(model), alone(None))
    for kind in (Lora, Control, Look):  # each has a part in it
        assert not near(alone(kind), want, 1e-3)


PAIR = {"prompt": ["a birb", "a red birb"], "seed": [5, 5]}  # a source and its edit
CONTROLS = [PromptToPrompt(self_replace_steps=1.0), MutualSelfAttention(0.0), PlugAndPlay(1.0, 1.0)]
BESIDE = [Lora, Word, Free, Perturbed, Sliced, Control, Look]


@pytest.mark.thinned(11)
@pytest.mark.parametrize("control", CONTROLS, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("kind", BESIDE)
def test_control_of_attention_beside_another_kind_is_that_one_by_hand_and_it_attached(
    control, kind, model, optimized, traces, files, by_hand
):
    """In both orders, plain and optimized; the source's picture is what the other kind alone paints."""
    one = kind(files)
    options = PAIR | ({"prompt": ["a birb", "a large birb"]} if kind is Word else {})
    with on(model, one) as adapters:
        without = paint(model, adapters, **options)
        got = paint(model, [control, *adapters], **options)
    assert near(got[0], without[0], NEAR) and not near(got[1], without[1], 1e-3)
    with on(optimized, one) as adapters:
        assert near(paint(optimized, [*adapters, control], **options), got, NEAR)
    assert trace_of(model) == traces[model] and trace_of(optimized) == traces[optimized]
    if kind not in (Look, Perturbed):  # whose hooks are for one picture
        hand, further = by_hand(kind)
        prompts = (
            [text.replace("birb", WORDS) for text in options["prompt"]] if kind is Word else options["prompt"]
        )
        how = {name: value for name, value in further.items() if name != "prompt"}
        assert near(paint(hand, [control], **options | how | {"prompt": prompts}), got, NEAR)


def test_an_image_prompt_of_scale_0_is_the_text_alone(model):
    unet = copy.deepcopy(model.model.diffusion_model)
    x, t = keyed_input("pairs.x", (2, 4, 8, 6)), torch.tensor([7, 400])
    text, image = keyed_input("pairs.text", (2, 9, 128)), keyed_input("pairs.image", (2, 3, 128))
    with torch.no_grad():
        want = unet(x, t, text)
        for name, attn in named_attentions(unet).items():
            if name.endswith("attn2"):
                attn.set_processor(
                    fill(IPAttnProcessor(attn.inner_dim, 128, scale=0.0, num_tokens=3), "pairs.ip.")
                )
        assert torch.equal(unet(x, t, torch.cat([text, image], dim=1)), want)


# --- graphs and packing ---


def is_for_graphs(first, second):
    """Kinds that a graph is captured with; of what adds to a UNet's call, with a few others."""
    known = all(
        kind.known and not issubclass(kind, Optimized) and kind is not Word for kind in (first, second)
    )
    is_old = second not in ADDING or first in (Lora, Cached, *ADDING)
    return known and is_old and not {first, second} & {*FURTHER}


@pytest.mark.thinned(30)
@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if is_for_graphs(*pair)])
def test_what_is_known_is_captured_and_packed_once_however_often_it_goes_on(
    first, second, model, files, monkeypatch, caplog
):
    unet = model.model.diffusion_model
    a, b = first(files), second(files)
    counts = {"captured": 0, "packed": 0}
    pack = cpu.pack_linear

    def packing(*args):
        counts["packed"] += 1
        return pack(*args)

    def capture(run, inputs):
        counts["captured"] += 1
        return run

    seams.forget_said()
    monkeypatch.setattr(cuda_graphs, "CALLS_TO_CAPTURE", 1)
    monkeypatch.setattr(cpu, "pack_linear", packing)
    optimize(model)
    try:
        cuda_graphs.attach(unet, capture)
        states = [(), (a,), (a, b)]
        for kinds in states:
            with on(model, *kinds) as adapters:
                paint(model, adapters)
        once = dict(counts)
        for kinds in (states[2], states[0], states[2], states[1]):
            with on(model, *kinds) as adapters:
                paint(model, adapters)
    finally:
        restore(model)
    cached = 2 * (Cached is first) + (Cached is second)  # whole steps and those between
    assert counts == once and once["captured"] == 3 + cached and not caplog.messages


@pytest.mark.parametrize("foreign", [OwnProcessor, Hook])
def test_what_is_foreign_is_named_once_beside_what_is_known(foreign, model, files, monkeypatch, caplog):
    seams.forget_said()
    captured = []
    monkeypatch.setattr(cuda_graphs, "CALLS_TO_CAPTURE", 1)
    unet, lora, other = model.model.diffusion_model, Lora(files), foreign(files)
    cuda_graphs.attach(unet, lambda run, inputs: captured.append(1) or run)
    for kinds in ((lora, other), (other,), (lora,), (lora, other), ()):
        with on(model, *kinds) as adapters:
            paint(model, adapters)
    restore(model)
    assert len(captured) == 2
    name = {"OwnProcessor": "OwnProcessor.theirs", "Hook": "Hook.on"}[foreign.__name__]
    assert len(caplog.messages) == 1 and name in caplog.messages[0]


# --- schedules, streams, and what is done to a model meanwhile ---


class Counted:
    """A LoRA whose changes count how often they are applied."""

    rank = seams.Rank.WEIGHTS

    def __init__(self, lora):
        self.lora, self.applied, self.known = lora, 0, {}

    def begin(self):
        self.lora = self.lora.begin()
        return self

    def at(self, step):
        self.lora.at(step)

    def attach(self, network):
        raise AssertionError("weights are swapped by what `changes` says")

    def changes(self, network):
        return {name: self.counting(change) for name, change in self.lora.changes(network).items()}

    def counting(self, change):
        def apply(weight):
            self.applied += 1
            return change.apply(weight)

        return self.known.setdefault(change, seams.Change(apply))


def stream(model, adapters, steps=4):
    options = {"steps": steps, "sampler": "ddim", "width": 64, "height": 64, "output_type": "latent"}
    return StableDiffusion(model).stream("a ring", seed=7, adapters=adapters, **options)


def latents_of(steps):
    *_, last = steps
    return last.result.latents


def test_schedules_and_streams_in_turn_fold_each_weight_once(model, files):
    first = Counted(LoRA(files["lora"], text_weight=0.0, end=0.5))
    second = Counted(LoRA(files["dora"], text_weight=0.0, start=0.5))
    for _ in range(2):
        latents_of(stream(model, [first]))
        for pair in zip(stream(model, [first]), stream(model, [second]), strict=True):
            assert len(pair) == 2
    assert first.applied == len(first.known) > 5 and second.applied == len(second.known) > 2


def test_packing_follows_the_weights_of_two_streams_in_turn(optimized, files, monkeypatch):
    packed, pack = [], cpu.pack_linear
    monkeypatch.setattr(cpu, "pack_linear", lambda *args: packed.append(1) or pack(*args))
    loras = [LoRA(files["lora"], text_weight=0.0, end=0.5), LoRA(files["dora"], text_weight=0.0, start=0.5)]
    counts = []
    for _ in range(2):
        for _ in zip(*(stream(optimized, [lora]) for lora in loras), strict=True):
            pass
        counts.append(len(packed))
    assert counts[0] == counts[1] > 0


def test_two_streams_with_the_same_lora_stand_at_steps_of_their_own(model, files):
    lora = LoRA(files["lora"], end=0.5)
    want = latents_of(stream(model, [lora]))
    early, late = stream(model, [lora]), stream(model, [lora])
    for _ in range(3):  # this one is past the end of the LoRA when the other begins
        next(early)
    assert torch.equal(latents_of(late), want) and torch.equal(latents_of(early), want)


def test_a_model_that_is_cast_between_two_steps_goes_on_in_the_new_precision(model, files):
    model = copy.deepcopy(model)
    lora = LoRA(files["lora"], text_weight=0.0)
    want = latents_of(stream(model, [lora]))
    steps, sd = stream(model, [lora]), StableDiffusion(model)
    next(steps)
    sd.to(dtype=torch.bfloat16)
    got = latents_of(steps)
    assert 1e-4 < (got - want).abs().max() / want.abs().max() < 0.2
    dtypes = {p.dtype for p in model.model.parameters()}
    assert dtypes == {torch.bfloat16} and torch.isfinite(got).all()


def small(model):
    """The UNet alone, and a call of it."""
    unet = copy.deepcopy(model.model.diffusion_model).requires_grad_(False)
    x, context = keyed_input("pairs.x", (2, 4, 8, 6)), keyed_input("pairs.text", (2, 9, 128))

    def ask(network):
        dtype = network.out[2].weight.dtype
        return network(x.to(dtype), torch.tensor([7, 400]), context.to(dtype))

    return unet, ask


def test_what_is_cast_while_something_is_attached_is_cast_whole(model, files):
    unet, ask = small(model)
    lora = LoRA(files["lora"])
    with attached(unet, lora):
        unet.double()
    want = copy.deepcopy(model.model.diffusion_model).double()
    assert {p.dtype for p in unet.parameters()} == {torch.float64}
    assert torch.equal(ask(unet), ask(want))
    for network in (unet, want):
        with attached(network, lora):
            assert ask(network).dtype == torch.float64
    with attached(unet, lora), attached(want, LoRA(files["lora"])):
        assert torch.equal(ask(unet), ask(want))
    unet.float()
    with attached(unet, lora):
        assert {p.dtype for p in unet.parameters()} == {torch.float32}


@pytest.mark.parametrize("way", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_made_while_something_is_attached_is_one_of_what_the_network_is_there(model, files, way):
    unet, ask = small(model)
    plain = ask(unet)
    with attached(unet, LoRA(files["lora"]), TokenMerging(0.5), DeepCache(2)):
        copied = way(unet)
        want = ask(unet)
    assert torch.equal(ask(copied), want) and torch.equal(ask(unet), plain)
    assert not torch.equal(want, plain)


@pytest.mark.parametrize("change", [optimize, restore])
def test_a_model_optimized_or_restored_while_something_is_attached_stays_so(model, files, change):
    unet, ask = small(model)
    plain = ask(unet)
    if change is restore:
        optimize(unet)
    with attached(unet, LoRA(files["lora"]), DeepCache(2)):
        change(unet)
        ask(unet)
    has = {name for name, module in unet.named_modules() if seams.execution_of(module) is not None}
    assert ("" in has) == (change is optimize) and bool(has) == (change is optimize)
    assert near(ask(unet), plain, NEAR)
    restore(unet)
    assert not any("forward" in vars(module) for module in unet.modules()) and torch.equal(ask(unet), plain)


TRANSFORMER = "input_blocks.1.1.transformer_blocks.0"


@pytest.mark.parametrize(
    "place",
    ["input_blocks.1.0", "input_blocks.1.0.in_layers.2", "input_blocks.1.1.norm"]
    + [f"{TRANSFORMER}.{name}" for name in ("attn1", "attn1.to_q", "attn2", "ff", "ff.net.2")],
)
def test_a_hook_on_a_part_that_guided_halves_share_is_called_with_both(place, optimized):
    unet = optimized.model.diffusion_model
    x, t = keyed_input("pairs.x", (1, 4, 8, 6)).expand(2, -1, -1, -1), torch.tensor([7, 7])
    context, seen = keyed_input("pairs.text", (2, 9, 128)), []
    with torch.no_grad():
        want = unet(x, t, context)
        handle = unet.get_submodule(place).register_forward_hook(
            lambda m, given, out: seen.append(len(given[0]))
        )
        got = unet(x, t, context)
        handle.remove()
    assert seen and set(seen) == {2} and near(got, want, NEAR)


@pytest.mark.slow
def test_networks_of_adapters_go_where_the_call_is_under_sequential_offload(model, files):
    adapters = [
        ControlNet(files["control"], HINT),
        T2IAdapter(files["t2i"], HINT, 0.5),
        IPAdapter(files["image"], embeds=EMBEDS, mask=torch.ones(8, 8)),
    ]
    want = [paint(model, [one]) for one in adapters]
    with pretended():
        optimize(offloaded := build(), low_vram=torch.device("cuda"))
        for one, expected in zip(adapters, want, strict=True):
            assert near(paint(offloaded, [one]).cpu(), expected, 2e-5), type(one).__name__
