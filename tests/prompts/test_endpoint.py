"""An endpoint that misbehaves is asked again, or refused in one sentence; it never becomes a number."""

import time

import numpy as np
import pytest

from jaxml import prompts
from jaxml.prompts import Endpoint, EndpointError
from tests.prompts.server import Script, serve

CHAT = [{"role": "user", "content": "who?"}]


def answer(path, body):
    """A model that repeats its prompt, each letter a token that is the less likely the later it stands."""
    if path.endswith("/chat/completions"):
        text = body["messages"][-1]["content"]
        told = {"content": [{"token": c, "logprob": -0.5} for c in text]} if body.get("logprobs") else None
        choice = {"message": {"role": "assistant", "content": text}, "logprobs": told}
        return {"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": len(text)}}
    text = body["prompt"] + "!" if body.get("echo") else body["prompt"].upper()
    values = [None, *(-0.01 * i for i in range(1, len(text)))]
    told = {"token_logprobs": values, "text_offset": list(range(len(text))), "tokens": list(text)}
    told = told if body.get("echo") else None
    return {"choices": [{"text": text, "logprobs": told}], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}


def endpoint(url, **options):
    return Endpoint(url, "tiny", **({"backoff": 0.01, "retries": 3, "timeout": 0.3} | options))


@pytest.mark.parametrize("step", ["slow", 429, 500, 503, "cut", "drop", "garbage", "empty"])
def test_what_fails_for_a_while_is_asked_again(step):
    script = Script(step, step, "ok", answer=answer)
    with serve(script) as url, endpoint(url) as llm:
        assert llm.generate(["hi"]) == [("HI", 3, 1, None)]
        assert len(script.requests) == 3


@pytest.mark.parametrize("step, said", [
    ("slow", "ReadTimeout"), (429, "status 429"), (500, "status 500"), ("cut", "RemoteProtocolError"),
    ("drop", "RemoteProtocolError|ReadError"), ("garbage", "not the answer that was asked for"),
    ("empty", "holds choices"), ("drip", "ReadTimeout: an answer is whole within 0.2 s"),
])  # fmt: skip
def test_what_goes_on_failing_is_said_with_its_last_failure(step, said):
    script = Script(step, answer=answer)
    with serve(script) as url, endpoint(url, retries=1, timeout=0.2) as llm:
        with pytest.raises(EndpointError, match=f"(?s)no answer after 2 attempts.*({said})"):
            llm.generate(["hi"])
        assert len(script.requests) == 2


def test_an_answer_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(prompts.endpoint, "ANSWER_BYTES", 2**22)
    script = Script("endless", answer=answer)
    with serve(script) as url, endpoint(url, timeout=20) as llm:
        with pytest.raises(EndpointError, match="an answer has at most 4,194,304 bytes"):
            llm.generate(["hi"])
        assert len(script.requests) == 1


@pytest.mark.parametrize("odd", [
    {"choices": [{"text": "a", "logprobs": [1]}]}, {"choices": [{"text": "a"}], "usage": "none"},
    {"choices": [{"text": "a"}], "usage": {"prompt_tokens": float("inf")}},
    {"choices": [{"text": "a"}], "usage": {"completion_tokens": "many"}}, {"choices": [{"message": "a"}]},
    {"choices": [{"text": "a", "logprobs": {"content": [1]}}]}, {"choices": [{"message": {"content": [1]}}]},
    {"choices": [{"text": "a", "logprobs": {"token_logprobs": [-(10**400)]}}]},
])  # fmt: skip
def test_answers_with_odd_fields_are_a_sentence_and_are_not_kept(odd, tmp_path):
    replies = [odd, {"choices": [{"text": "fine"}]}]
    script = Script("ok", answer=lambda path, body: replies.pop(0))
    with serve(script) as url, endpoint(url, cache=tmp_path / "kept.jsonl", retries=0, timeout=5) as llm:
        with pytest.raises(EndpointError, match=r"fields of an answer|a choice holds text"):
            llm.generate(["hi"])
        assert llm.generate(["hi"])[0].text == "fine"


def test_one_failure_ends_what_is_under_way():
    script = Script(401, "drip", answer=answer)
    with serve(script) as url, endpoint(url, timeout=30, concurrency=2) as llm:
        begun = time.perf_counter()
        with pytest.raises(EndpointError, match="status 401"):
            llm.generate(["a", "b", "c", "d"])
        assert time.perf_counter() - begun < 10


def test_a_refusal_is_not_repeated_and_nobody_listening_is_said():
    script = Script(401, answer=answer)
    with serve(script) as url, endpoint(url) as llm:
        with pytest.raises(EndpointError, match="status 401"):
            llm.generate(["hi"])
        assert len(script.requests) == 1
    with endpoint(url, retries=0) as llm, pytest.raises(EndpointError, match="ConnectError"):
        llm.generate(["hi"])


def test_a_server_is_left_alone_for_as_long_as_it_asks():
    script = Script(429, "ok", answer=answer, retry_after="0.3")
    with serve(script) as url, endpoint(url) as llm:
        begun = time.perf_counter()
        llm.generate(["hi"])
        assert time.perf_counter() - begun >= 0.3


def test_answers_keep_their_order_and_no_more_are_under_way_than_allowed():
    script = Script(answer=answer)
    asked = [f"p{i}" for i in range(12)]
    with serve(script) as url, endpoint(url, concurrency=3, timeout=5, api_key="secret") as llm:
        assert [r.text for r in llm.generate(asked)] == [p.upper() for p in asked]
        assert 1 < script.most <= 3
        assert {h.get("Authorization") for *_, h in script.requests} == {"Bearer secret"}
    assert "secret" not in repr(llm.name)


def test_answers_are_kept_on_disk_and_never_torn(tmp_path):
    file = tmp_path / "kept.jsonl"
    script = Script(answer=answer)
    with serve(script) as url:
        for _ in range(2):
            with endpoint(url, cache=file) as llm:
                assert [r.text for r in llm.generate(["a", "b"])] == ["A", "B"]
        assert len(script.requests) == 2
        whole = file.read_bytes()
        file.write_bytes(whole[:-5])  # the process died while it wrote
        with endpoint(url, cache=file) as llm:
            assert [r.text for r in llm.generate(["a", "b"])] == ["A", "B"]
        assert len(script.requests) == 3
        file.write_text("nonsense\n")
        with pytest.raises(ValueError, match=r"line 1: a kept answer is \[key, answer\]"):
            endpoint(url, cache=file)


def test_messages_are_asked_as_a_chat_and_samples_know_their_likelihood():
    script = Script(answer=answer)
    with serve(script) as url, endpoint(url) as llm:
        assert llm.generate([CHAT], temperature=0.5, stop=["x"])[0].text == "who?"
        path, body, _ = script.requests[0]
        assert path == "/v1/chat/completions" and body["messages"] == CHAT and body["stop"] == ["x"]
        replies = llm.sample(CHAT, 3)
        assert [r.log_prob for r in replies] == [-2.0] * 3
        assert [body["seed"] for _, body, _ in script.requests[1:]] != [0, 0, 0]
        votes = prompts.self_consistency(llm, CHAT, 3, weight="likelihood")
        assert votes.answer == "who?"


def test_likelihoods_are_read_from_the_echoed_prompt():
    script = Script(answer=answer)
    with serve(script) as url, endpoint(url) as llm:
        found = llm.score(["ab", "c"], [["x", "yz"], ["x"]])
        np.testing.assert_allclose(found[0].log_probs, [-0.02, -0.05])
        np.testing.assert_allclose(found[1].log_probs, [-0.01])
        assert found[0].tokens.tolist() == [1, 2]
        np.testing.assert_allclose(
            prompts.score_choices(llm, ["ab"], ["x", "yz"], correction="tokens")[0], [-0.02, -0.025]
        )


@pytest.mark.parametrize("change", ["zeros", "none", "no tokens", "error", "one"])
def test_a_server_that_tells_no_likelihood_is_refused_and_never_gives_zeros(change):
    def silent(path, body):
        made = answer(path, body)
        told = made["choices"][0]["logprobs"]
        if change == "zeros":  # as some servers do
            told["token_logprobs"] = [0.0] * len(told["token_logprobs"])
        if change == "none":
            made["choices"][0]["logprobs"] = None
        if change == "no tokens":
            told["token_logprobs"] = []
        if change == "one":
            told["token_logprobs"], told["text_offset"] = told["token_logprobs"][-1:], told["text_offset"][-1:]
        return made

    script = Script(400 if change == "error" else "ok", answer=silent)
    with serve(script) as url, endpoint(url, retries=0) as llm:
        with pytest.raises(NotImplementedError, match="prompt's l"):
            prompts.score_choices(llm, ["ab"], ["x", "y"])
        with pytest.raises(NotImplementedError, match="chat endpoint"):
            llm.score([CHAT], [["x"]])


def test_a_token_in_front_is_no_part_of_the_text_and_usage_may_be_missing():
    def with_bos(path, body):
        made = answer(path, body)
        told = made["choices"][0]["logprobs"]
        bos = "<|begin|>"
        told["tokens"] = [bos, *told["tokens"]]
        told["text_offset"] = [0, *(o + len(bos) for o in told["text_offset"])]
        told["token_logprobs"] = [None, -0.7, *told["token_logprobs"][1:]]
        return made | {"usage": None}

    with serve(Script(answer=with_bos)) as url, endpoint(url) as llm:
        found = llm.score(["ab"], [["x", "yz"]])[0]
        np.testing.assert_allclose(found.log_probs, [-0.02, -0.05])
        assert found.tokens.tolist() == [1, 2]
        np.testing.assert_allclose(llm.score([""], [["ab"]])[0].log_probs, [-0.71])


def test_a_server_that_writes_no_token_loses_none():
    def bare(path, body):
        made = answer(path, body)
        told = made["choices"][0]["logprobs"]
        for name in told:
            told[name] = told[name][:-1]
        return made | {"usage": {"completion_tokens": 0}}

    with serve(Script(answer=bare)) as url, endpoint(url) as llm:
        np.testing.assert_allclose(llm.score(["ab"], [["yz"]])[0].log_probs, [-0.05])


def test_an_answer_of_thoughts_alone_is_empty_and_asked_for_once():
    silent = lambda path, body: {"choices": [{"message": {"role": "assistant", "content": None}}]}
    script = Script(answer=silent)
    with serve(script) as url, endpoint(url) as llm:
        assert llm.generate([CHAT])[0].text == "" and len(script.requests) == 1


def test_a_key_is_shown_to_nobody():
    assert "secret" not in repr(endpoint("http://x/v1", api_key="secret"))
    with pytest.raises(ValueError, match="one line of printable") as error:
        endpoint("http://x/v1", api_key="secret\r")
    assert "secret" not in str(error.value)
    with pytest.raises(ValueError, match="retries is at least 0"):
        endpoint("http://x", retries=-1)


def test_a_token_across_the_border_is_refused():
    def straddling(path, body):
        made = answer(path, body)
        told = made["choices"][0]["logprobs"]
        told["text_offset"] = [o // 2 * 2 for o in told["text_offset"]]
        return made

    script, refused = Script(answer=straddling), pytest.raises(ValueError, match="straddles it")
    with serve(script) as url, endpoint(url) as llm, refused:
        llm.score(["abc"], [["x"]])
    with pytest.raises(ValueError, match="begins with http"):
        endpoint("localhost")
    with pytest.raises(ValueError, match="timeout is above 0"):
        endpoint("http://x", timeout=0)


def test_an_address_that_is_none_is_a_sentence():
    with pytest.raises(ValueError, match="Endpoint: url is an address, got"):
        Endpoint("http://\x00/", "m")
