"""Traces: every form is read, malformed rows are named, generators keep their promises."""

from pathlib import Path

import numpy as np
import pytest

from jaxsys.errors import UsageError
from jaxsys.serve.simulation.made_traces import lognormal_lengths, poisson_arrivals, synthetic_trace
from jaxsys.serve.simulation.trace_files import read_trace
from jaxsys.serve.simulation.traces import RequestTrace
from studies.lengths import lengths_from_csv, trace_of_lengths

DATA = Path(__file__).resolve().parents[4] / "shared" / "data"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_azure_form(tmp_path):
    trace = read_trace(
        write(
            tmp_path,
            AZURE
            + "2023-11-16 18:17:03.9799600,4808,10\n"
            + "2023-11-16 18:17:04.0319600,3180,0\n",
        )
    )
    assert trace.arrival_s == pytest.approx([0.0, 0.052])
    assert trace.prompt_tokens.tolist() == [4808, 3180]
    assert trace.output_tokens.tolist() == [10, 1]


def test_azure_2024_form_with_zone(tmp_path):
    trace = read_trace(
        write(
            tmp_path,
            AZURE + "2024-05-10 00:00:00.009930+00:00,2162,5\n2024-05-10 00:00:01+00:00,2399,6\n",
        )
    )
    assert trace.arrival_s == pytest.approx([0.0, 0.99007])


def test_mooncake_and_plain_forms(tmp_path):
    mooncake = "timestamp_ms,input_length,output_length,num_hash_blocks\n0,5,2,1\n1500,7,3,1\n"
    assert read_trace(write(tmp_path, mooncake)).arrival_s.tolist() == [0.0, 1.5]
    plain = "arrival_s,prompt_tokens,output_tokens\n2,5,2\n2.5,7,3\n"
    assert read_trace(write(tmp_path, plain)).arrival_s.tolist() == [0.0, 0.5]


def test_json_lines_are_read_by_the_same_names(tmp_path):
    # As Mooncake's traces are published: milliseconds, and blocks that prompts share.
    text = (
        '{"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1]}\n\n'
        '{"timestamp": 3052, "output_length": 0, "input_length": 7234, "more": null}\n'
    )
    trace = read_trace(write(tmp_path, "\ufeff" + text))
    assert trace.arrival_s.tolist() == [0.0, 3.052]
    assert trace.prompt_tokens.tolist() == [6758, 7234]
    assert trace.output_tokens.tolist() == [500, 1]
    assert trace.unused == "hash_ids" and trace.head(1).unused == "hash_ids"
    comma = "timestamp,input_length,output_length\n0,6758,500\n3052,7234,0\n"
    same = read_trace(write(tmp_path, comma))
    assert same.arrival_s.tolist() == [0.0, 3.052] and same.unused is None
    azure = '{"TIMESTAMP": "2023-11-16 18:17:0%d", "ContextTokens": 5, "GeneratedTokens": 2}\n'
    assert read_trace(write(tmp_path, azure % 3 + azure % 5)).arrival_s.tolist() == [0.0, 2.0]
    plain = '{"arrival_s": %s, "prompt_tokens": 5, "output_tokens": 2, "session_id": "%s"}\n'
    talks = read_trace(write(tmp_path, plain % (2.5, "a") + plain % (3, "b") + plain % (3.5, "a")))
    assert talks.arrival_s.tolist() == [0.0, 0.5, 1.0]
    assert talks.sessions is not None and talks.sessions.tolist() == [0, 1, 0]


MOON = '{"timestamp": 0, "input_length": 5, "output_length": 2}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MOON + '{"timestamp": 5, "input_length": 5}\n', "row 2: there is no output_length"),
        (MOON + "\n[1]\n", r"row 3 is \[1\]; a JSON object a line is needed"),
        (MOON + "0,5,2\n", "row 2 is not JSON"),
        (MOON.replace("5", "5.5"), "row 1, column input_length: '5.5' is not a whole number"),
        (MOON.replace("5", "true"), "column input_length: True is neither a number nor a text"),
        (MOON.replace("5", "null"), "column input_length: None is neither a number nor a text"),
        (MOON.replace("5", "0"), "row 1, column input_length: 0 tokens"),
        (MOON.replace(" 0", " NaN"), "column timestamp: 'NaN' is not a finite number"),
        (MOON.replace(" 0", " 9") + MOON, "row 2, column timestamp: '0' lies before the row"),
        (MOON.replace("{", '{"timestamp": 1, '), "row 1 is not JSON"),
        ('{"when": 0, "tokens": 5}\n', r"names \['when', 'tokens'\] are not known; use one of"),
        ("[" + MOON.strip() + "]\n", "is one JSON list; write each request as a JSON object"),
    ],
)
def test_malformed_json_lines_are_named(tmp_path, text, message):
    with pytest.raises(UsageError, match=message):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("2023-11-16 18:17:03.97,abc,10\n", r"row 2, column ContextTokens: 'abc'"),
        ("2023-11-16 18:17:03.97,5,1.5\n", r"row 2, column GeneratedTokens: '1.5'"),
        ("yesterday,5,1\n", r"row 2, column TIMESTAMP: 'yesterday'"),
        ("2023-11-16 18:17:03,5\n", r"row 2: 2 values for 3 columns"),
        ("2023-11-16 18:17:03,5,1,9\n", r"row 2: 4 values for 3 columns"),
        ("2023-11-16 18:17:03,0,5\n", r"row 2, column ContextTokens: 0 tokens"),
        ("2023-11-16 18:17:03,5,-5\n", r"row 2, column GeneratedTokens: -5 tokens"),
        ("2023-11-16 18:17:03,5,5\n2023-11-16 18:17:02,5,5\n", r"row 3, column TIMESTAMP.*sort"),
        ("", "holds no requests"),
    ],
)
def test_malformed_rows_are_named(tmp_path, rows, message):
    with pytest.raises(UsageError, match=message):
        read_trace(write(tmp_path, AZURE + rows))


def test_unknown_forms_and_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_trace(tmp_path / "absent.csv")
    with pytest.raises(UsageError, match=r"columns \['a', 'b'\] are not known"):
        read_trace(write(tmp_path, "a,b\n1,2\n"))
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(UsageError, match="binary.csv line 1 is not UTF-8 text"):
        read_trace(tmp_path / "binary.csv")
    with pytest.raises(UsageError, match="trace.csv is empty"):
        read_trace(write(tmp_path, ""))


def test_a_column_named_twice_is_refused_and_blank_rows_are_passed_over(tmp_path):
    with pytest.raises(UsageError, match="column prompt_tokens is there 2 times"):
        read_trace(write(tmp_path, "arrival_s,prompt_tokens,output_tokens,prompt_tokens\n"))
    text = "\n\narrival_s,prompt_tokens,output_tokens\n0,10,5\n\n1,10,x\n"
    with pytest.raises(UsageError, match="row 6, column output_tokens: 'x' is not a whole number"):
        read_trace(write(tmp_path, text))


@pytest.mark.parametrize("arrival", ["nan", "inf"])
def test_arrivals_are_finite(tmp_path, arrival):
    rows = f"arrival_s,prompt_tokens,output_tokens\n0,5,2\n{arrival},7,3\n"
    with pytest.raises(UsageError, match=f"row 3, column arrival_s: '{arrival}' is not a finite"):
        read_trace(write(tmp_path, rows))


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
@pytest.mark.parametrize(
    ("file", "requests", "rate"),
    [
        ("AzureLLMInferenceTrace_code.csv", 8819, 2.57),
        ("AzureLLMInferenceTrace_conv.csv", 19366, 5.53),
        ("mooncake_conversation_trace.csv", 12031, 3.40),
    ],
)
def test_published_traces(file, requests, rate):
    trace = read_trace(DATA / file)
    assert len(trace) == requests
    assert trace.rate_per_s == pytest.approx(rate, rel=0.01)


def test_rate_slices_and_repeats():
    trace = synthetic_trace(rate_per_s=10, duration_s=50, seed=1)
    assert trace.rate_per_s == pytest.approx(10, rel=0.2)
    assert trace.at_rate(30).rate_per_s == pytest.approx(30)
    part = trace.between(10, 20)
    assert part.arrival_s.min() >= 0 and part.arrival_s.max() < 10
    assert len(trace.head(7)) == 7
    long = trace.repeated(500)
    assert len(long) == pytest.approx(10 * len(trace), rel=0.03)
    assert (np.diff(long.arrival_s) >= 0).all() and long.duration_s < 500
    with pytest.raises(UsageError, match="no arrivals"):
        trace.between(1000, 2000)
    with pytest.raises(UsageError, match="no request fits"):
        trace.clipped(1)


def test_a_random_part_keeps_the_form():
    trace = synthetic_trace(rate_per_s=50.0, duration_s=60.0, seed=3)
    part = trace.sampled(0.25, seed=1)
    assert len(part) == pytest.approx(0.25 * len(trace), rel=0.1)
    assert set(part.arrival_s.tolist()) <= set(trace.arrival_s.tolist())
    assert part.prompt_tokens.mean() == pytest.approx(trace.prompt_tokens.mean(), rel=0.15)
    with pytest.raises(UsageError, match="share=0"):
        trace.sampled(0.0)


def test_daily_swing_thins_the_night():
    trace = synthetic_trace(rate_per_s=1, duration_s=2000, seed=1).repeated(86_400, daily_swing=0.8)
    day = ((trace.arrival_s > 18_000) & (trace.arrival_s < 25_000)).sum()
    night = ((trace.arrival_s > 61_000) & (trace.arrival_s < 68_000)).sum()
    assert day > 5 * night


def test_generators():
    gaps = np.diff(poisson_arrivals(20_000, 4.0, 0))
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.05)
    bursty = np.diff(poisson_arrivals(20_000, 4.0, 0, cv=3.0))
    assert bursty.std() / bursty.mean() == pytest.approx(3.0, rel=0.1)
    lengths = lognormal_lengths(50_000, 250, 0.8, 0)
    assert lengths.mean() == pytest.approx(250, rel=0.03)
    assert lengths.min() >= 1 and lengths.max() <= 3000


def test_lengths_without_arrivals(tmp_path):
    path = write(tmp_path, "num_prefill_tokens,num_decode_tokens\n5,1\n6,2\n")
    prompts, outputs = lengths_from_csv(path)
    trace = trace_of_lengths(prompts, outputs, rate_per_s=5, duration_s=20)
    assert len(trace) == 100 and set(trace.prompt_tokens) == {5, 6}
    with pytest.raises(UsageError, match="missing"):
        lengths_from_csv(write(tmp_path, "a\n1\n"))


def test_unequal_columns_are_refused():
    with pytest.raises(UsageError, match="differ in length"):
        RequestTrace(
            name="t",
            arrival_s=np.zeros(2),
            prompt_tokens=np.ones(1, int),
            output_tokens=np.ones(2, int),
        )


def test_burstgpt_form_and_sessions(tmp_path):
    header = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,"
    rows = "5,a,1,ChatGPT,472,18,490,Conversation log\n45,b,1,GPT-4,100,9,109,API log\n"
    trace = read_trace(write(tmp_path, header + "Log Type\n" + rows))
    assert trace.arrival_s.tolist() == [0.0, 40.0]
    assert trace.prompt_tokens.tolist() == [472, 100] and trace.output_tokens.tolist() == [18, 9]
    assert trace.sessions is not None and trace.sessions.tolist() == [0, 1]
    # The first release has no sessions.
    first = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    assert read_trace(write(tmp_path, first + "5,ChatGPT,472,18,490,x\n")).sessions is None


def sessions_of(trace: RequestTrace) -> list[int]:
    assert trace.sessions is not None
    return trace.sessions.tolist()


def test_sessions_stay_with_their_requests(tmp_path):
    text = "arrival_s,prompt_tokens,output_tokens,session_id\n0,10,5,x\n1,20,5,y\n2,30,5,x\n"
    trace = read_trace(write(tmp_path, text))
    assert sessions_of(trace.clipped(26)) == [0, 1]
    assert sessions_of(trace.between(1, 3)) == [1, 0]
    assert sessions_of(trace.repeated(6.5)) == [0, 1, 0, 2, 3, 2, 4, 5]
    with pytest.raises(UsageError, match="row 2, column session_id: a session's name is needed"):
        read_trace(write(tmp_path, text.splitlines()[0] + "\n0,10,5,\n"))
    with pytest.raises(UsageError, match="row 2, column Response tokens: 'x' is not a whole"):
        read_trace(write(tmp_path, "Timestamp,Request tokens,Response tokens\n1,5,x\n"))
