"""The pragma check: our sources pass, and each kind of mistake is found."""

import pytest

from fpga.build.pragmas import RULES, lint
from fpga.build.sources import HLS

BODY = """\
void helper(const int* in, int n) {
  int buffer[8];
%s
  LOOP: for (int i = 0; i < n; ++i) {
%s
    buffer[i %% 8] = in[i];
%s
  }
}
"""


def messages(in_function: str = "", in_loop: str = "", after: str = "") -> list[str]:
    return [p.message for p in lint(BODY % (in_function, in_loop, after))]


@pytest.mark.parametrize(
    "path",
    sorted([*HLS.glob("kernel/*.cpp"), *HLS.glob("*/**/*.h")]),
    ids=lambda p: p.name,
)
def test_our_sources_pass(path: object) -> None:
    assert lint(path.read_text()) == []


def test_every_pragma_that_we_use_is_seen() -> None:
    text = "".join(p.read_text() for p in HLS.glob("kernel/*.cpp"))
    assert text.count("#pragma HLS") > 60
    bent = text.replace("#pragma HLS ", "#pragma HLS X")
    assert sum("unknown pragma" in p.message for p in lint(bent)) == text.count("#pragma HLS")


def test_pragmas_as_a_formatter_writes_them_pass() -> None:
    loop = (
        "#pragma HLS PIPELINE II = 1 style = flp\n"
        "#pragma HLS LOOP_TRIPCOUNT min = 1 max = \\\n    kTile * kTile"
    )
    assert messages("#pragma HLS ARRAY_PARTITION variable = buffer complete dim = 1", loop) == []


def test_good_pragmas_pass() -> None:
    assert (
        messages(
            "#pragma HLS ARRAY_PARTITION variable=buffer cyclic factor=2 dim=1",
            "#pragma HLS PIPELINE II=1 style=flp\n#pragma HLS UNROLL factor=kTile",
        )
        == []
    )


@pytest.mark.parametrize(
    ("where", "pragma", "message"),
    [
        ("loop", "PIPELIN II=1", "unknown pragma HLS PIPELIN; did you mean 'PIPELINE'?"),
        ("loop", "PIPELINE I=1", "PIPELINE has no option 'I'"),
        ("loop", "PIPELINE I = 1", "PIPELINE has no option 'I'"),
        ("loop", "PIPELINE II = 1 1", "PIPELINE has no option '1'"),
        ("loop", "PIPELINE II=", "II must be a number or a constant, not ''"),
        ("loop", "PIPELINE II=1 II=2", "gives II twice"),
        ("loop", "PIPELINE style=fast", "style must be one of stp, frp, flp, not 'fast'"),
        ("loop", "PIPELINE rewnd", "no option 'rewnd'; did you mean 'rewind'?"),
        ("after", "PIPELINE II=1", "PIPELINE must come before the first statement of its loop"),
        ("after", "UNROLL", "UNROLL must come before the first statement"),
        ("function", "UNROLL", "UNROLL belongs in the body of a loop"),
        ("loop", "INLINE", "INLINE belongs in the body of a function"),
        (
            "function",
            "INTERFACE m_axi port=in bundle=gmem",
            "belongs in the body of the top function dpgemm, not in helper",
        ),
        (
            "function",
            "ARRAY_PARTITION variable=bufer complete",
            "names 'bufer', which helper has not declared before",
        ),
        ("function", "ARRAY_PARTITION complete", "ARRAY_PARTITION needs variable="),
        (
            "function",
            "ARRAY_PARTITION variable=buffer complete cyclic",
            "has one of cyclic, block, complete, not complete and cyclic",
        ),
        ("function", "ARRAY_PARTITION variable=buffer type=cycle", "did you mean 'cyclic'?"),
        ("function", "STREAM variable=later depth=2", "names 'later'"),
        ("function", "DATA_PACK variable=buffer", "DATA_PACK is deprecated: use AGGREGATE"),
        (
            "function",
            "RESOURCE variable=buffer core=RAM_1P",
            "RESOURCE is deprecated: use BIND_OP or BIND_STORAGE",
        ),
        ("function", "BIND_STORAGE variable=buffer type=ram_3p", "type must be one of"),
        ("loop", "LOOP_TRIPCOUNT min=1", "LOOP_TRIPCOUNT needs max="),
        ("loop", "", "a pragma without a name"),
    ],
)
def test_a_mistake_is_found(where: str, pragma: str, message: str) -> None:
    found = messages(
        **{
            {"loop": "in_loop", "function": "in_function", "after": "after"}[
                where
            ]: f"#pragma HLS {pragma}"
        }
    )
    assert len(found) >= 1
    assert any(message in m for m in found), found


def test_a_problem_has_its_line() -> None:
    (problem,) = lint(BODY % ("", "#pragma HLS PIPELIN", ""))
    assert problem.line == 5


def test_loops_need_labels_and_comments_are_no_code() -> None:
    text = (
        "void f() {\n  // for (;;) {\n  /* #pragma HLS NONSENSE */\n  for (int i = 0; i < 2; "
        "++i) {\n  }\n}\n"
    )
    (problem,) = lint(text)
    assert (problem.line, "needs a label" in problem.message) == (4, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("#pragma HLS PIPELINE\n", "stands outside of any function"),
        ("void f() {\n#pragma hls PIPELINE\n}\n", "write HLS, not hls"),
        ("#pragma HSL PIPELINE\n", "unknown pragma 'HSL PIPELINE'"),
        ("#pragma omp parallel\n", "unknown pragma 'omp parallel'"),
    ],
)
def test_pragmas_in_no_place_or_of_no_kind(text: str, message: str) -> None:
    assert message in lint(text)[0].message


def test_the_table_knows_only_options_that_it_can_check() -> None:
    kinds = {k for r in RULES.values() for k in r.options.values() if isinstance(k, str)}
    assert kinds <= {"number", "name"}
