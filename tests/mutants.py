"""Sound files, changed at random by somebody who knows how they are built; and whether any of them gets out of hand.

    python tests/mutants.py SEED COUNT [KIND]

reads COUNT mutants of each kind of file and prints a line of JSON: how many were refused as what, and every fault: an
exception that is none of ours, a message that is no short line, something run, more than 2 s of processor time.
"""

import copy
import encodings.cp437  # noqa: F401 (Python imports it for odd names in zips)
import encodings.raw_unicode_escape  # noqa: F401 (and this for texts of old pickles)
import io
import json
import pickletools
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from hostile import BANNED, long1, text

WORDS = [
    *(
        "os system",
        "posix system",
        "builtins eval",
        "builtins getattr",
        "builtins set",
        "builtins dict",
        "_codecs encode",
    ),
    *(
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_tensor_v3",
        "torch._utils _rebuild_parameter",
    ),
    *(
        "torch._tensor _rebuild_from_type_v2",
        "torch FloatStorage",
        "torch.storage UntypedStorage",
        "torch float16",
    ),
    *(
        "torch Size",
        "torch device",
        "collections OrderedDict",
        "collections Counter",
        "collections defaultdict",
    ),
    *(
        "typing Any",
        "pathlib PosixPath",
        "numpy ndarray",
        "numpy.core.multiarray scalar",
        "copyreg _reconstructor",
    ),
    *(
        "pytorch_lightning.callbacks ModelCheckpoint",
        "torch.nn.parameter Parameter",
        "builtins bytearray",
        "a b",
    ),
]
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    4,
    7,
    255,
    256,
    2**31 - 1,
    2**31,
    2**40,
    -(2**31),
    2**61 - 1,
    2**63,
    2**127,
    10**400,
]
ODD = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        1.5,
        -0.0,
        float("nan"),
        float("inf"),
        2**40,
        10**30,
        "",
        "x",
        "\0",
        "\ud800",
        "../x",
    ),
    *(
        "a" * 300,
        [],
        [[]],
        [0],
        ["a"],
        [None],
        {},
        {"a": 1},
        [1, 2, 3],
        ["a", "b"],
        "F32",
        "BF16",
        32,
        64,
        0.5,
    ),
]


def bytewise(body: bytes, dice: random.Random) -> bytes:
    """Flip, cut, repeat or overwrite some bytes."""
    changed = bytearray(body)
    for _ in range(dice.choice((1, 1, 1, 2, 5))):
        if not changed:
            break
        at, length = dice.randrange(len(changed)), dice.choice((1, 1, 2, 4, 8, 50))
        match dice.randrange(5):
            case 0:
                changed[at] ^= 1 << dice.randrange(8)
            case 1:
                del changed[at : at + length]
            case 2:
                changed[at:at] = changed[at : at + length] * dice.choice((1, 2, 40))
            case 3:
                changed[at : at + length] = dice.randbytes(length)
            case 4:
                changed[at : at + 4] = struct.pack("<q", dice.choice(NUMBERS[:12]))[:4]
    return bytes(changed)


def operations(body: bytes) -> list[bytes]:
    """Cut a pickle into its operations."""
    places = [place for _, _, place in pickletools.genops(body)] + [len(body)]
    return [body[a:b] for a, b in zip(places, places[1:], strict=False)]


def rewritten(body: bytes, dice: random.Random) -> bytes:
    """Change some operations of a pickle: their order, number, names and arguments."""
    parts = operations(body)
    spare = [part for part in parts if part != b"."]
    for _ in range(dice.choice((1, 1, 2, 3, 8))):
        at = dice.randrange(1, len(parts))
        match dice.randrange(8):
            case 0:
                del parts[at]
            case 1:
                parts.insert(at, dice.choice(spare))
            case 2:
                parts[at] = dice.choice(spare)
            case 3:
                other = dice.randrange(1, len(parts))
                parts[at], parts[other] = parts[other], parts[at]
            case 4:
                parts.insert(at, long1(dice.choice(NUMBERS)))
            case 5:
                parts[at] = long1(dice.choice(NUMBERS)) if parts[at][:1] in b"KMJ\x8a" else dice.choice(spare)
            case 6:
                named = [i for i, part in enumerate(parts) if part[:1] in (b"c", b"\x93")]
                word = dice.choice(WORDS).split(" ")
                stacked = text(word[0]) + text(word[1]) + b"\x93"
                plain = b"c" + "\n".join(word).encode() + b"\n"
                parts[dice.choice(named) if named else at] = dice.choice((plain, stacked, b"0" * 2 + stacked))
            case 7:
                codes = [code.code.encode("latin-1") for code in pickletools.opcodes if code.arg is None]
                parts.insert(at, dice.choice(codes))
        if len(parts) < 2:
            break
    return b"".join(parts)


def zip_mutant(body: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.25:
        return bytewise(body, dice)
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(body)) as old, zipfile.ZipFile(out, "w") as new:
        victim = dice.choice(old.namelist())
        deed = dice.randrange(8)
        for info in old.infolist():
            data = old.read(info)
            if info.filename.endswith("data.pkl"):
                data = rewritten(data, dice) if deed else bytewise(data, dice)
            if info.filename == victim and deed == 1:
                continue
            if info.filename == victim and deed == 2:
                data = bytewise(data, dice)
            if info.filename == victim and deed == 3:
                info.filename = dice.choice(
                    ("archive/data/9", "../x", "x", "archive/", "archive/data/1", info.filename.upper())
                )
            if info.filename == victim and deed == 4:
                info.compress_type = zipfile.ZIP_DEFLATED
                data = data * dice.choice((1, 1000))
            new.writestr(info, data)
    return out.getvalue()


def legacy_mutant(body: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.3:
        return bytewise(body, dice)
    stream = io.BytesIO(body)
    pickles = []
    for _ in range(5):
        start = stream.tell()
        for _ in pickletools.genops(stream):
            pass
        pickles.append(body[start : stream.tell()])
    rest = body[stream.tell() :]
    at = dice.choice((0, 1, 2, 3, 3, 3, 3, 4))
    pickles[at] = rewritten(pickles[at], dice)
    return b"".join(pickles) + (bytewise(rest, dice) if dice.random() < 0.2 else rest)


def json_mutant(value: Any, dice: random.Random) -> Any:
    """Change some places of what JSON holds."""
    value = copy.deepcopy(value)
    for _ in range(dice.choice((1, 1, 1, 2, 4))):
        place, key = None, None
        inner = value
        while isinstance(inner, dict | list) and inner and (place is None or dice.random() < 0.75):
            place, key = inner, dice.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
            inner = inner[key]
        if place is None:
            return copy.deepcopy(dice.choice(ODD))
        match dice.randrange(6):
            case 0:
                del place[key]
            case 1:
                place[key] = [place[key]]
            case 2 if isinstance(place, dict):
                place[dice.choice(("", "x", "__metadata__", "\ud800", "a b", "../x", "9" * 300))] = place.pop(
                    key
                )
            case 3:
                other = json_mutant(place[key], dice) if isinstance(place[key], dict | list) else place[key]
                place[key] = other
            case _:
                place[key] = copy.deepcopy(dice.choice(ODD))
    return value


def spelt(value: Any, dice: random.Random) -> bytes:
    body = json.dumps(value)
    if dice.random() < 0.05:
        body = body.replace("1", "9" * 5000, 1)
    return bytewise(body.encode(), dice) if dice.random() < 0.1 else body.encode()


def safe_mutant(body: bytes, dice: random.Random) -> bytes:
    if dice.random() < 0.2:
        return bytewise(body, dice)
    (length,) = struct.unpack("<Q", body[:8])
    header = spelt(json_mutant(json.loads(body[8 : 8 + length]), dice), dice)
    stated = len(header) if dice.random() < 0.95 else dice.choice((0, 1, length, len(header) + 1, 2**40))
    return struct.pack("<Q", stated) + header + body[8 + length :]


# --- seeds ------------------------------------------------------------------------------------------------------


def state() -> dict[str, Any]:
    from collections import OrderedDict

    weights = OrderedDict(
        a=torch.arange(6.0).reshape(2, 3), b=torch.ones(4).half(), c=torch.ones(3).to(torch.float8_e5m2)
    )
    weights["view"] = weights["a"].T
    return {
        "state_dict": weights,
        "epoch": 3,
        "sizes": [torch.Size([2, 3]), (1, 2), {1, "a"}, b"\xff", None, True, 0.5],
        "path": Path("a"),
        "version": torch.__version__,
        "count": Counter("aab"),
    }


def saved(**options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(state(), out, **options)
    return out.getvalue()


def tokenizer() -> dict[str, Any]:
    from ldm.shapes.bpe import learn_bpe

    vocab, merges = learn_bpe(["cat", "dog"])
    return {
        "model": {"type": "BPE", "vocab": vocab, "merges": [list(pair) for pair in merges]},
        "version": "1.0",
    }


FOLDER = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
    },
    "unet/config.json": {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "in_channels": 4,
        "out_channels": 4,
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "sample_size": 8,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "act_fn": "silu",
        "norm_num_groups": 32,
        "use_linear_projection": False,
    },
    "vae/config.json": {
        "block_out_channels": [32, 64],
        "layers_per_block": 1,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 4,
        "sample_size": 16,
        "scaling_factor": 0.2,
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
    },
    "scheduler/scheduler_config.json": {
        "beta_start": 0.001,
        "beta_end": 0.02,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 4,
        "prediction_type": "epsilon",
        "trained_betas": [0.1, 0.2, 0.3, 0.4],
    },
    "text_encoder/config.json": {"hidden_size": 24, "max_position_embeddings": 11},
}


def read_pickle(folder: Path) -> None:
    from ldm.checkpoints import read_object, read_tensors

    read_object(folder / "a")
    read_tensors(folder / "a")


def read_safe(folder: Path) -> None:
    from ldm.checkpoints import read_tensors

    read_tensors(folder / "a")


def read_tokenizer(folder: Path) -> None:
    from ldm.modules.encoders.tokenizer import read_vocabulary

    read_vocabulary(folder / "tokenizer.json")


def read_folder(folder: Path) -> None:
    from ldm.checkpoints.folders import folder_settings

    folder_settings(folder)


def safetensors_file() -> bytes:
    import safetensors.torch

    return safetensors.torch.save({"a": torch.ones(2, 3), "b": torch.ones(4).half()}, {"format": "pt"})


def one_file(
    mutate: Callable[[Any, random.Random], bytes], name: str = "a"
) -> Callable[..., dict[str, bytes]]:
    return lambda sound, dice: {name: mutate(sound, dice)}


def json_file(value: Any, dice: random.Random) -> bytes:
    return spelt(json_mutant(value, dice), dice)


def json_files(files: dict[str, Any], dice: random.Random) -> dict[str, bytes]:
    victim = dice.choice(list(files))
    return {
        name: json_file(value, dice) if name == victim else json.dumps(value).encode()
        for name, value in files.items()
    }


# kind -> what is sound, its mutants as files, their reader
KINDS: dict[str, tuple[Any, Callable[[Any, random.Random], dict[str, bytes]], Callable[[Path], None]]] = {
    "zip, protocol 2": (saved(), one_file(zip_mutant), read_pickle),
    "zip, protocol 4": (saved(pickle_protocol=4), one_file(zip_mutant), read_pickle),
    "zip, protocol 5": (saved(pickle_protocol=5), one_file(zip_mutant), read_pickle),
    "before torch 1.6": (saved(_use_new_zipfile_serialization=False), one_file(legacy_mutant), read_pickle),
    "safetensors": (safetensors_file(), one_file(safe_mutant), read_safe),
    "tokenizer.json": (tokenizer(), one_file(json_file, "tokenizer.json"), read_tokenizer),
    "diffusers folder": (FOLDER, json_files, read_folder),
}


def main(seed: int, count: int, only: str = "") -> None:
    from ldm.errors import LdmError

    resource.setrlimit(resource.RLIMIT_AS, (16 << 30,) * 2)
    folder = Path(tempfile.mkdtemp())
    happened: list[str] = []
    watching = False

    def watch(event: str, arguments: tuple) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if watching and (event in BANNED or writes):
            happened.append(f"{event} {str(arguments)[:80]}")

    sys.addaudithook(watch)
    warnings.simplefilter("ignore")  # zipfile's, for entries that stand twice
    outcomes: dict[str, Counter[str]] = {}
    faults: list[str] = []
    slowest = 0.0
    for kind, (sound, mutate, read) in KINDS.items():
        if only not in kind:
            continue
        outcomes[kind] = Counter()
        for number in range(count):
            for name, body in mutate(sound, random.Random(f"{seed} {kind} {number}")).items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(body)
            happened.clear()
            message, outcome, before = "", "none", time.process_time()
            watching = bool(number)  # not the first one: what is imported late is imported then
            try:
                read(folder)
            except LdmError as error:
                outcome, message = type(error).__name__, str(error)
            except BaseException as error:
                outcome = type(error).__name__
                faults.append(f"{kind} {number}: {outcome}: {str(error)[:200]}")
            watching = False
            took = time.process_time() - before
            slowest = max(slowest, took)
            outcomes[kind][outcome] += 1
            if happened:
                faults.append(f"{kind} {number}: runs {happened[:3]}")
            if len(message) > 400 or not message.isprintable():
                faults.append(f"{kind} {number}: says {message[:500]!r}")
            if took > 2:
                faults.append(f"{kind} {number}: takes {took:.2f} s")
    shutil.rmtree(folder)
    print(json.dumps({"outcomes": outcomes, "faults": faults, "slowest": slowest}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
