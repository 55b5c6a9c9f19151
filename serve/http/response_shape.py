"""How responses look: items of output, whole or as the events that clients put together again.

response.created, response.in_progress
for each item: output_item.added
    content_part.added, output_text.delta ..., output_text.done, content_part.done
    or function_call_arguments.delta ..., function_call_arguments.done
output_item.done
response.completed, or response.incomplete where the length ended it
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jaxsys.serve.http.answers import Choice, Shape, Usage
from jaxsys.serve.http.responses import new_id
from jaxsys.serve.http.tools import CallPart, Said
from jaxsys.serve.http.vocabulary import Vocabulary

Event = dict[str, Any]


class ResponseShape(Shape):
    """`/v1/responses`; one choice."""

    prefix = "resp"

    def __init__(
        self,
        model: str,
        vocabulary: Vocabulary,
        head: dict[str, Any],
        keep: Callable[[dict[str, Any]], None],
        logprobs: bool = False,
    ):
        """
        Args:
            head: the response before anything is in it.
            keep: told of the whole response.
        """
        super().__init__(model, vocabulary, logprobs)
        self.identity = head["id"]
        self.body = head
        self.keep = keep
        self._number = 0
        self._open: Event | None = None
        """The item that is being put out."""
        self._call = -1
        """Which call it is."""

    # --- Shape --------------------------------------------------------------------------------

    def whole(self, choices: Sequence[Choice], usage: Usage, method: str) -> dict[str, Any]:
        (choice,) = choices
        list(self.increments(choice))
        list(self._end(choice.finish_reason, usage, method))
        return self.body

    def opening(self, index: int) -> list[Event]:
        shown = {"response": dict(self.body)}
        return [
            self._event("response.created", **shown),
            self._event("response.in_progress", **shown),
        ]

    def increments(self, choice: Choice, usage: dict[str, Any] | None = None) -> Iterator[Event]:
        """The events of one part."""
        said = Said(content=choice.text) if choice.said is None else choice.said
        if said.reasoning:
            yield from self._text("reasoning", said.reasoning, choice)
        if said.content or (self.logprobs and choice.tokens and not said):
            yield from self._text("message", said.content, choice)
        for part in said.calls:
            yield from self._called(part)
        self._reason = choice.finish_reason or self._reason

    _reason: str | None = None

    def ending(self, usage: Usage, method: str, asked: bool) -> Iterator[Event]:
        yield from self._end(self._reason, usage, method)

    def failure(self, message: str) -> Iterator[Event]:
        """The last event where the response came to nothing."""
        self.body |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        yield self._event("response.failed", response=self.body)

    # --- inside -------------------------------------------------------------------------------

    def _event(self, kind: str, **fields: Any) -> Event:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _place(self) -> dict[str, Any]:
        assert self._open is not None
        return {"item_id": self._open["id"], "output_index": len(self.body["output"]) - 1}

    def _add(self, item: Event) -> Iterator[Event]:
        yield from self._close()
        self._open = item
        self.body["output"].append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield self._event(
            "response.output_item.added", output_index=len(self.body["output"]) - 1, item=shown
        )

    def _text(self, kind: str, text: str, choice: Choice) -> Iterator[Event]:
        if self._open is None or self._open["type"] != kind:
            if kind == "message":
                part: Event = {"type": "output_text", "text": "", "annotations": []}
                part["logprobs"] = []
                item: Event = {"id": new_id("msg"), "type": kind, "role": "assistant"}
                item |= {"status": "in_progress", "content": [part]}
            else:
                part = {"type": "reasoning_text", "text": ""}
                item = {"id": new_id("rs"), "type": kind, "summary": [], "content": [part]}
                item["status"] = "in_progress"
            yield from self._add(item)
            yield self._event(
                "response.content_part.added", **self._place(), content_index=0, part=dict(part)
            )
        assert self._open is not None
        part = self._open["content"][0]
        part["text"] += text
        fields: dict[str, Any] = {"content_index": 0, "delta": text}
        if kind == "message":
            fields["logprobs"] = self.entries(choice) if self.logprobs else []
            part["logprobs"] += fields["logprobs"]
        name = "output_text" if kind == "message" else "reasoning_text"
        yield self._event(f"response.{name}.delta", **self._place(), **fields)

    def _called(self, part: CallPart) -> Iterator[Event]:
        if part.name is not None:
            self._call = part.index
            item: Event = {"id": new_id("fc"), "type": "function_call", "status": "in_progress"}
            item |= {"call_id": self._call_id(part.index), "name": part.name, "arguments": ""}
            yield from self._add(item)
        if part.arguments:
            assert self._open is not None and part.index == self._call
            self._open["arguments"] += part.arguments
            yield self._event(
                "response.function_call_arguments.delta", **self._place(), delta=part.arguments
            )

    def _call_id(self, index: int) -> str:
        return f"call_{self.identity[-24:]}{index}"

    def _close(self, status: str = "completed") -> Iterator[Event]:
        item = self._open
        if item is None:
            return
        place = self._place()
        item["status"] = status
        if item["type"] == "function_call":
            yield self._event(
                "response.function_call_arguments.done",
                **place,
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            part = item["content"][0]
            text = {"content_index": 0, "text": part["text"]}
            if item["type"] == "message":
                text["logprobs"] = part["logprobs"]
                yield self._event("response.output_text.done", **place, **text)
            else:
                yield self._event("response.reasoning_text.done", **place, **text)
            yield self._event("response.content_part.done", **place, content_index=0, part=part)
        yield self._event(
            "response.output_item.done", output_index=place["output_index"], item=item
        )
        self._open = None

    def _end(self, reason: str | None, usage: Usage, method: str) -> Iterator[Event]:
        cut = reason == "length"
        if not self.body["output"]:  # an answer of nothing is still one
            yield from self._text("message", "", Choice(0, "", []))
        yield from self._close("incomplete" if cut else "completed")
        found = usage.body(method)
        self.body["usage"] = {
            "input_tokens": found.pop("prompt_tokens"),
            "input_tokens_details": found.pop("prompt_tokens_details"),
            "output_tokens": found.pop("completion_tokens"),
            "output_tokens_details": found.pop(
                "completion_tokens_details", {"reasoning_tokens": 0}
            ),
            **found,
        }
        self.body["status"] = "incomplete" if cut else "completed"
        if cut:
            self.body["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            self.body["completed_at"] = int(time.time())
        self.keep(self.body)
        yield self._event(f"response.{self.body['status']}", response=self.body)
