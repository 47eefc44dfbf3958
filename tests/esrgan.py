"""An upscaler of ESRGAN's family small enough for every test, in the names that its trainer gives."""

from keyed import weight


def esrgan(scale=2, features=3, growth=32):
    """The state of an RRDBNet of one block, in the names that BasicSR gives."""
    shapes = {"conv_first": (features, 3)}
    for i in range(1, 4):
        for j in range(1, 6):
            out = features if j == 5 else growth
            shapes[f"body.0.rdb{i}.conv{j}"] = (out, features + (j - 1) * growth)
    shapes["conv_body"] = (features, features)
    for i in range(1, scale.bit_length()):
        shapes[f"conv_up{i}"] = (features, features)
    shapes |= {"conv_hr": (features, features), "conv_last": (3, features)}
    return {
        f"{name}.{kind}": weight(f"up.{name}.{kind}", (*shape, 3, 3) if kind == "weight" else shape[:1])
        for name, shape in shapes.items()
        for kind in ("weight", "bias")
    }
