"""Chat templates are bounded in time, memory and length; whatever they do is the client's 400."""

import asyncio
import time

import pytest

from jaxsys.errors import UsageError
from jaxsys.model import ByteTokenizer
from jaxsys.serve.http.templates import Templates

USER = [{"role": "user", "content": "a"}]


def templates(source, **settings):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = source
    return Templates(tokenizer, **settings)


def rendered(source, messages=USER, *, limit_s=5.0, **options):
    made = templates(source, limit_s=limit_s)
    try:
        return asyncio.run(made.render(messages, **options))
    finally:
        made.close()


def test_variables_reach_the_template():
    source = "{{ eos_token }}{{ thinking }}{{ messages[0].content }}{{ add_generation_prompt }}"
    found = rendered(source, add_generation_prompt=False, variables={"thinking": "no"})
    assert found == "<|endoftext|>noaFalse"
    with pytest.raises(UsageError, match="holds 'messages', which the request itself sets"):
        rendered(source, variables={"messages": []})


LONG = "{% for a in range(9999) %}{% for b in range(9999) %}{{ b }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (LONG, "took over 0.5 s, or too much memory"),
        ("{{ 'a' * 17000000 }}", "characters of these messages; at most"),
        ("{{ 'a' * 2000000000 }}", "MemoryError|of memory"),
        ("{{ 1 // 0 }}", "by zero"),
        ("{{ messages[0].content.nothing.more }}", "chat template"),
        ("{{ raise_exception('not so') }}", "not so"),
        ("{{ messages[5].content }}", "chat template"),
        ("{% for %}", "chat template"),
        (None, "has no chat template"),
    ],
)
def test_whatever_a_template_does_is_refused(source, words):
    began_s = time.monotonic()
    with pytest.raises(UsageError, match=words) as caught:
        rendered(source, limit_s=0.5 if source == LONG else 20)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began_s < 30


def test_one_that_takes_long_holds_up_neither_others_nor_the_end():
    source = "{% if messages[0].content == 'long' %}" + LONG + "{% endif %}x"
    made = templates(source, limit_s=60)

    async def run():
        long = asyncio.create_task(made.render([{"role": "user", "content": "long"}]))
        for _ in range(3):
            assert await asyncio.wait_for(made.render(USER), 30) == "x"
        assert not long.done()
        began_s = time.monotonic()
        made.close()
        with pytest.raises((Exception, asyncio.CancelledError), match="shutting down"):
            await asyncio.wait_for(long, 10)
        assert time.monotonic() - began_s < 5

    asyncio.run(run())
    assert not made._apart._all


def test_a_looping_template_leaves_completions_and_health_alone(scripted):
    tokenizer = ByteTokenizer()
    tokenizer.chat_template = LONG
    server = scripted(tokenizer, lambda _: {97: 9.0})

    async def run():
        async with server.client() as client:
            body = {"messages": USER, "max_tokens": 1}
            chat = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            body = {"prompt": "x", "max_tokens": 2, "temperature": 0}
            found = await client.post("/v1/completions", json=body)
            health = await client.get("/health")
            server.app.state.close()
            return found, health, await chat

    found, health, chat = server.run(run())
    assert found.json()["choices"][0]["text"] == "aa" and health.status_code == 200
    assert chat.status_code in (400, 503)  # it took too long, or the end came first
