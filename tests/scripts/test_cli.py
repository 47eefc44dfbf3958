"""The scripts' floor: numbers are validated, errors are one line with their own exit code."""

import logging
import os
import signal

import pytest

from ldm import errors
from ldm.cli import Parser, integer, number, printable, run, seed


def ending(main, argv=(), capsys=None):
    with pytest.raises(SystemExit) as stop:
        run(main, list(argv))
    out = capsys.readouterr()
    return stop.value.code, out.err


def raiser(error):
    def main(argv):
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (errors.UsageError("width 500"), 2, "ldm: error: width 500"),
        (errors.FormatError("cut"), 3, "ldm: error: cut"),
        (errors.UnsafeFileError("code"), 4, "code"),
        (errors.MismatchError("v2"), 5, "v2"),
        (errors.ResourceError("full"), 6, "full"),
        (errors.OutputError("ro"), 7, "ro"),
        (errors.NumericError("nan"), 8, "nan"),
        (errors.AbsentError("where"), 9, "where"),
        (KeyboardInterrupt(), 130, "interrupted; finished images"),
        (MemoryError("big"), 6, "out of memory: big"),
        (RuntimeError("CUDA out of memory. Tried"), 6, "smaller size or batch"),
        (RuntimeError("could not create a primitive"), 6, "smaller size or batch"),
        (OSError(28, "No space left on device"), 7, "cannot write"),
        (FileNotFoundError(2, "No such file", "x.png"), 9, "not found"),
        (
            ZeroDivisionError("division by zero"),
            1,
            "unexpected ZeroDivisionError: division by zero; this is a bug, --debug",
        ),
    ],
)
def test_each_kind_of_error_is_one_line_with_its_code(error, code, words, capsys):
    got, err = ending(raiser(error), capsys=capsys)
    assert got == code
    assert words in err and err.count("\n") == 1 and "Traceback" not in err


def test_success_is_zero_and_silent(capsys):
    assert ending(lambda argv: None, capsys=capsys) == (0, "")


def test_sigterm_ends_with_143_and_the_handler_is_given_back(capsys):
    before = signal.getsignal(signal.SIGTERM)
    code, err = ending(lambda argv: os.kill(os.getpid(), signal.SIGTERM), capsys=capsys)
    assert code == 143 and err.startswith("ldm: error: terminated")
    assert signal.getsignal(signal.SIGTERM) is before


def test_debug_adds_the_traceback_above_the_line(capsys):
    code, err = ending(raiser(errors.UsageError("no")), ["--debug"], capsys)
    assert code == 2 and err.startswith("Traceback") and err.splitlines()[-1] == "ldm: error: no"


def test_a_line_holds_no_control_characters_and_keeps_its_end():
    text = "bad \x1b[31m name \u202e\nwith " + "x" * 5000 + " do this instead"
    line = printable(text)
    assert (
        len(line) == 400 and line.isprintable() and "\\x1b[31m" in line and line.endswith("do this instead")
    )


def test_library_warnings_become_lines_on_stderr(capsys):
    code, err = ending(lambda argv: logging.getLogger("ldm.x").warning("cut\nhere"), capsys=capsys)
    assert (code, err) == (0, "ldm: warning: cut here\n")


def parser() -> Parser:
    p = Parser(prog="demo")
    p.add_argument("--steps", "--ddim_steps", type=integer(1, 1000), default=50)
    p.add_argument("--scale", type=number(0, 100), default=7.5)
    p.add_argument("--seed", type=seed, default=42)
    p.add_argument("--plms", action="store_true")
    return p


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--steps", "0"], "argument --steps/--ddim_steps: wanted a whole number from 1 to 1000, got '0'"),
        (["--steps", "1001"], "got '1001'"),
        (["--steps", "1.5"], "got '1.5'"),
        (["--scale", "nan"], "wanted a number from 0 to 100, got 'nan'"),
        (["--scale", "inf"], "got 'inf'"),
        (["--scale=-1"], "got '-1'"),
        (["--scale", "x"], "got 'x'"),
        (["--seed", "-2"], "wanted a seed from 0 to 2^64-1, or -1 or 'random' to draw one, got '-2'"),
        (["--seed", str(2**64)], "or 'random'"),
        (["--seed", "abc"], "got 'abc'"),
        (["--stepz", "3"], "unknown option '--stepz'; did you mean '--steps'?"),
        (["--step", "3"], "did you mean '--steps'?"),
        (["--qqqq"], "unknown option '--qqqq'; see demo"),
        (["red", "circle"], "unexpected word 'red'; put quotes"),
        (["--steps", "3", "--ddim_steps=4"], "option --steps was given twice"),
        (["--steps"], "expected one argument, or one that begins with a dash, as --name=-value; see demo"),
        (["--steps", "9" * 5000], "got '9999"),
    ],
)
def test_bad_options_are_usage_errors(argv, words):
    with pytest.raises(errors.UsageError) as caught:
        parser().parse_args(argv)
    assert words in str(caught.value) and len(str(caught.value)) <= 400


def test_good_options_pass_and_given_tells_them_from_defaults():
    p = parser()
    argv = ["--ddim_steps", "1000", "--seed", str(2**64 - 1), "--plms", "--plms"]
    args = p.parse_args(argv)
    assert (args.steps, args.seed, args.plms, args.scale, args.debug) == (1000, 2**64 - 1, True, 7.5, False)
    assert p.given(argv) == {"steps", "seed", "plms"}
    assert [p.parse_args(["--seed", text]).seed for text in ("random", "-1")] == [None, None]
