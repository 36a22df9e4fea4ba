"""One request's text, whatever the protocol: the generator's steps, detokenised, ended by stop strings."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from disagg.errors import DisaggError, OverloadedError
from disagg.frontend.backend import Backend
from disagg.routing.brake import Demand
from disagg.service.generation import GenerationRequest
from disagg.service.text import TextAssembler, TextDelta
from disagg.types import FinishReason


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts, with the meaning of OpenAI's fields."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int


class TextGeneration:
    """One sequence being generated. Closing `stream` cancels it everywhere.

    demand: what others are held to if this one is refused; None for nobody.
    """

    def __init__(
        self,
        backend: Backend,
        request: GenerationRequest,
        *,
        skip_special_tokens: bool = True,
        demand: Demand | None = None,
    ) -> None:
        self.request = request
        self._demand = demand
        self._shedding = backend.shedding
        self._generator = backend.generator
        self._assembler = TextAssembler(
            backend.tokenizer, request.params, skip_special_tokens=skip_special_tokens
        )

    @property
    def usage(self) -> Usage:
        return Usage(
            len(self.request.prompt_token_ids),
            self._assembler.num_tokens,
            self._assembler.num_cached_tokens,
        )

    async def stream(self) -> AsyncGenerator[TextDelta, None]:
        """Yield what each step adds; the last delta, and only it, has a finish_reason.

        Raises what Generator.generate raises, and DisaggError if it ends without a finish_reason.
        """
        try:
            async with aclosing(self._generator.generate(self.request)) as outputs:
                async for output in outputs:
                    if output.error is not None or output.finish_reason is FinishReason.ERROR:
                        raise DisaggError(output.error or "the generation failed")
                    delta = self._assembler.push(output)
                    self.request.timeline.complete = self._assembler.finished
                    yield delta
                    if self._assembler.finished:
                        return
        except OverloadedError as error:
            if self._demand is not None:
                self._shedding.refused(self._demand, error)
            raise
        raise DisaggError("the generation ended without a result")


class GenerationGroup:
    """Several generations as one stream of (index, delta), in the order in which steps arrive.

    The first error ends all of them. Closing the stream closes every generation before it returns.
    """

    def __init__(self, generations: Sequence[TextGeneration]) -> None:
        self._generations = generations
        self._queue: asyncio.Queue[tuple[int, TextDelta | Exception]] = asyncio.Queue()

    def abort(self) -> None:
        """End every generation that still runs with FinishReason.ABORT; what was produced is kept."""
        for index in range(len(self._generations)):
            self._queue.put_nowait((index, TextDelta((), "", finish_reason=FinishReason.ABORT)))

    async def stream(self) -> AsyncGenerator[tuple[int, TextDelta], None]:
        tasks = [asyncio.create_task(self._pump(i, g)) for i, g in enumerate(self._generations)]
        running = set(range(len(tasks)))
        try:
            while running:
                index, item = await self._queue.get()
                if index not in running:
                    continue
                if isinstance(item, Exception):
                    raise item
                if item.finish_reason is not None:
                    running.discard(index)
                yield index, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(self, index: int, generation: TextGeneration) -> None:
        try:
            async with aclosing(generation.stream()) as deltas:
                async for delta in deltas:
                    self._queue.put_nowait((index, delta))
        except Exception as error:
            self._queue.put_nowait((index, error))


async def stream_all(generations: Sequence[TextGeneration]) -> AsyncGenerator[tuple[int, TextDelta], None]:
    """Yield (index, delta) of all generations; a single one takes no detour over a queue."""
    if len(generations) > 1:
        async with aclosing(GenerationGroup(generations).stream()) as merged:
            async for item in merged:
                yield item
        return
    async with aclosing(generations[0].stream()) as deltas:
        async for delta in deltas:
            yield 0, delta


def total_usage(generations: Sequence[TextGeneration], choices_per_prompt: int) -> Usage:
    """Return the usage of a request: each prompt counts once, however many choices it has.

    Of a prompt's choices the fewest cached tokens count, since the others may have found the first one's.
    """
    usages = [generation.usage for generation in generations]
    prompts = [usages[i : i + choices_per_prompt] for i in range(0, len(usages), choices_per_prompt)]
    return Usage(
        sum(choices[0].prompt_tokens for choices in prompts),
        sum(usage.completion_tokens for usage in usages),
        sum(min(usage.cached_tokens for usage in choices) for choices in prompts),
    )
