"""Texts that make careless readers of metadata raise, or take long."""

HOSTILE = {
    "a - /": "a - / " * 10_000,
    "blanks": " " * 60_000,
    "blanks in a key": "p\n" + "a " * 30_000 + "x",
    "colons": ":" * 60_000,
    "colons and letters": "aa:" * 20_000,
    "quotes": '"' * 60_000,
    "open quotes": 'aa: "' * 12_000,
    "open quotes with commas": 'aa: "x, ' * 8_000,
    "an open quote of backslashes": 'aa: "' + "\\" * 60_000,
    "an open quote of letters": 'aa: "' + "x" * 60_000,
    "commas": "," * 60_000,
    "pairs": "aa: 1, " * 9_000,
    "negative prompts": "Negative prompt:\n" * 4_000,
    "lines": "\n" * 60_000,
    "digits": "Steps: "
    + "9" * 60_000
    + ", Seed: "
    + "9" * 60_000
    + ", Size: "
    + "9" * 60_000
    + "x"
    + "9" * 60_000,
    "a float of digits": "CFG scale: " + "9" * 60_000 + ", Eta: 0." + "0" * 60_000 + "1, Steps: 3",
    "900 lists": '{"schema": 1, "parameters": {"prompt": "p", "a": ' + "[" * 900 + "]" * 900 + "}}",
    "100,000 lists": "[" * 100_000,
    "100,000 dicts": '{"a":' * 100_000,
    "900 dicts": '{"1": ' * 900 + "1" + "}" * 900,
    "an integer of 100,000 digits": '{"schema": 1, "parameters": {"prompt": "p", "seed": '
    + "9" * 100_000
    + "}}",
    "an integer of 400 digits": '{"seed": '
    + "9" * 400
    + ', "positive_prompt": "p", "steps": '
    + "9" * 4000
    + "}",
    "a class of 900 lists": '{"1": {"inputs": {}, "class_type": ' + "[" * 900 + "]" * 900 + "}}",
    "a float of 100,000 digits": '{"cfg_scale": 1.' + "9" * 100_000 + "}",
    "escapes": '{"positive_prompt": "' + "\\u0041" * 50_000 + '"}',
    "one key many times": "{" + '"seed": 1, ' * 40_000 + '"seed": 2}',
}
