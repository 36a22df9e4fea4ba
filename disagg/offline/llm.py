"""LLM: batches of prompts on one engine in this process, without Ray.

prompts ──encode, check──► pending ──as there is room──► Engine ──step──► assemblers ──► RequestOutputs
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from disagg.config import BUNDLED_MODEL, DType, Kernels, Quantization, parse_config
from disagg.engine.overlap import engine_for
from disagg.errors import ConfigError, DisaggError, InvalidRequestError
from disagg.model.device import resolve_device
from disagg.model.runner import ModelRunner, load_runner
from disagg.offline.outputs import CompletionOutput, RequestOutput
from disagg.service.chat_template import Message
from disagg.service.generation import unroll
from disagg.service.text import TextAssembler, TextDelta
from disagg.service.tokenizer import Tokenizer
from disagg.types import Request, SamplingParams, StepOutput, TokenLogprobs

DEFAULT_KV_CACHE_BYTES = 1 << 30


#: A text, {"prompt": text}, token ids, or {"prompt_token_ids": token ids}.
PromptType = str | Mapping[str, str | Sequence[int]] | Sequence[int]
Conversation = Sequence[Message]


class _IdsOnly:
    """Stands in for TextAssembler where a checkpoint has no tokenizer: token ids, and no text."""

    def __init__(self) -> None:
        self.num_cached_tokens = 0
        self.finished = False

    def push(self, output: StepOutput) -> TextDelta:
        self.num_cached_tokens = max(self.num_cached_tokens, output.num_cached_tokens)
        self.finished = output.finish_reason is not None
        return TextDelta(output.token_ids, "", output.logprobs, output.finish_reason, output.matched_stop)


@dataclass(slots=True)
class _Choice:
    """One sequence of a prompt while it is generated."""

    request: Request
    assembler: TextAssembler | _IdsOnly
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    last: TextDelta | None = None

    def push(self, delta: TextDelta) -> None:
        self.text.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.last = delta

    def output(self, index: int) -> CompletionOutput:
        assert self.last is not None and self.last.finish_reason is not None
        wanted = self.request.params.logprobs is not None
        return CompletionOutput(
            index=index,
            text="".join(self.text),
            token_ids=tuple(self.token_ids),
            finish_reason=self.last.finish_reason,
            logprobs=tuple(self.logprobs) if wanted else None,
            stop_reason=self.last.matched_stop,
        )


@dataclass(slots=True)
class _Prompt:
    text: str | None
    token_ids: tuple[int, ...]
    choices: list[_Choice] = field(default_factory=list)
    running: int = 0


class LLM:
    """A model for offline inference; the engine and the runner are those of the cluster.

    model: a folder with safetensors, or None for the bundled model; without a tokenizer.json in it prompts
    are token ids and answers have no text. dtype, quantization, max_model_len,
    block_size, max_num_seqs, max_num_batched_tokens, enable_prefix_caching, kernels: as in the cluster's
    configuration. kv_cache_memory: bytes, or a share of the free memory in (0, 1]; None is 1 GiB on a CPU and
    0.9 of what a GPU has left beside the weights. num_threads: cores to compute on (of each rank), None for
    as many as torch would use. device: auto (a GPU where there is one), cpu, cuda or cuda:N.
    tensor_parallel_size: processes among which the model is cut; they end with this object.

    Not thread-safe. Raises ConfigError naming the argument that is wrong or does not fit the checkpoint.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        dtype: DType = "auto",
        quantization: Quantization | None = None,
        max_model_len: int | None = None,
        block_size: int = 16,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 1024,
        kv_cache_memory: int | float | None = None,
        enable_prefix_caching: bool = True,
        kernels: Kernels = "auto",
        num_threads: int | None = None,
        device: str = "auto",
        tensor_parallel_size: int = 1,
    ) -> None:
        folder = BUNDLED_MODEL if model is None else Path(model)
        if not folder.is_dir():
            raise ConfigError(f"model: {folder} is no folder", param="model")
        on = resolve_device(device, quantization=quantization, kernels=kernels)
        if kv_cache_memory is None and on.type == "cpu":
            kv_cache_memory = DEFAULT_KV_CACHE_BYTES
        config = parse_config(
            {
                "model": {"dtype": dtype, "quantization": quantization, "max_model_len": max_model_len},
                "engine": {
                    "block_size": block_size,
                    "max_num_seqs": max_num_seqs,
                    "max_num_batched_tokens": max_num_batched_tokens,
                    "kv_cache_memory": kv_cache_memory,
                    "enable_prefix_caching": enable_prefix_caching,
                    "kernels": kernels,
                },
            }
        )
        self._runner = load_runner(
            folder,
            config.engine,
            dtype=dtype,
            quantization=quantization,
            num_threads=num_threads,
            max_model_len=max_model_len,
            device=on,
            tensor_parallel_size=tensor_parallel_size,
        )
        self._engine = engine_for(
            config.engine,
            self._runner,
            num_blocks=self._runner.num_blocks,
            max_model_len=self._runner.max_model_len,
            hash_model=self._runner.fingerprint,
            eos_token_ids=self._runner.eos_token_ids,
        )
        self._folder = folder
        self._tokenizer = Tokenizer(folder) if (folder / "tokenizer.json").exists() else None
        # So many requests wait in the engine at most: enough that a step never lacks one.
        self._ahead = 2 * max_num_seqs
        self._ids = itertools.count()

    @property
    def runner(self) -> ModelRunner:
        """The loaded model and its KV cache."""
        return self._runner

    @property
    def max_model_len(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return self._engine.max_model_len

    def get_tokenizer(self) -> Tokenizer:
        """Return the checkpoint's tokenizer. Raises ConfigError where it has none."""
        if self._tokenizer is None:
            raise ConfigError(
                f"{self._folder} has no tokenizer.json: give prompt_token_ids, and no stop strings",
                param="model",
            )
        return self._tokenizer

    def generate(
        self,
        prompts: PromptType | Sequence[PromptType],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Continue each prompt; results are in the order of the prompts.

        prompts: one or many, each a text, {"prompt": text} or {"prompt_token_ids": [...]}. sampling_params:
        one for all, or one per prompt. Raises InvalidRequestError naming the prompt or field that is wrong,
        before anything is computed. An interrupt leaves the LLM usable.
        """
        listed = _listed(prompts)
        params = _params_of(sampling_params, len(listed))
        made = [self._prompt(prompt, f"prompts[{i}]", params[i]) for i, prompt in enumerate(listed)]
        return self._run(made, use_tqdm)

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Answer one conversation or many, rendered with the checkpoint's chat template."""
        tokenizer = self.get_tokenizer()
        prompts = [tokenizer.encode_chat(conversation) for conversation in _conversations(messages)]
        return self.generate(prompts, sampling_params, use_tqdm=use_tqdm)

    def _prompt(self, prompt: PromptType, name: str, params: SamplingParams) -> _Prompt:
        text, ids = self._encode(prompt, name)
        room = self.max_model_len - len(ids)
        if not ids or room < 1:
            raise InvalidRequestError(
                f"{name} has {len(ids)} tokens; 1 to {self.max_model_len - 1} can be taken", param=name
            )
        # As in the HTTP API of the cluster, an answer ends at the model's length at the latest.
        capped = replace(params, max_tokens=min(params.max_tokens or room, room))
        made = _Prompt(text, ids)
        for own in unroll(capped):
            request = Request(str(next(self._ids)), ids, len(ids), own)
            try:
                self._runner.check_request(request)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"{name}: {error}", param=error.param) from None
            made.choices.append(_Choice(request, self._assembler(own)))
        made.running = len(made.choices)
        return made

    def _assembler(self, params: SamplingParams) -> TextAssembler | _IdsOnly:
        if self._tokenizer is None and not params.stop:
            return _IdsOnly()
        return TextAssembler(self.get_tokenizer(), params)

    def _encode(self, prompt: PromptType, name: str) -> tuple[str | None, tuple[int, ...]]:
        given: Any = prompt
        if isinstance(prompt, Mapping):
            given = prompt.get("prompt_token_ids", prompt.get("prompt", ()))
        if isinstance(given, str):
            return given, tuple(self.get_tokenizer().encode(given))
        if isinstance(given, Sequence) and given and all(type(token) is int for token in given):
            return None, tuple(given)
        raise InvalidRequestError(
            f"{name} must be a text, {{'prompt': text}} or {{'prompt_token_ids': [id, ...]}}", param=name
        )

    def _run(self, prompts: list[_Prompt], use_tqdm: bool) -> list[RequestOutput]:
        pending = deque((prompt, choice) for prompt in prompts for choice in prompt.choices)
        active: dict[str, tuple[_Prompt, _Choice]] = {}
        try:
            progress: tqdm[Any]
            with tqdm(total=len(prompts), desc="Processed prompts", disable=not use_tqdm) as progress:
                speed = _Speed(progress)
                while pending or active:
                    while pending and len(active) < self._ahead:
                        item = pending.popleft()
                        self._engine.add(item[1].request, now=0.0)
                        active[item[1].request.request_id] = item
                    for prompt in self._step(active):
                        speed.finished(prompt)
        finally:
            for request_id in active:
                self._engine.abort(request_id)
        return [_result(prompt) for prompt in prompts]

    def _step(self, active: dict[str, tuple[_Prompt, _Choice]]) -> Iterator[_Prompt]:
        """Run one engine step; yield the prompts that it finished."""
        for output in self._engine.step(now=0.0):
            prompt, choice = active[output.request_id]
            if output.error is not None:
                raise DisaggError(output.error)
            choice.push(choice.assembler.push(output))
            if not choice.assembler.finished:
                continue
            if output.finish_reason is None:  # a stop string, of which the engine knows nothing
                self._engine.abort(output.request_id)
            del active[output.request_id]
            prompt.running -= 1
            if prompt.running == 0:
                yield prompt


class _Speed:
    """Shows tokens per second beside the count of finished prompts."""

    def __init__(self, progress: tqdm[Any]) -> None:
        self._progress = progress
        self._prompt_tokens = self._output_tokens = 0

    def finished(self, prompt: _Prompt) -> None:
        self._prompt_tokens += len(prompt.token_ids)
        self._output_tokens += sum(len(choice.token_ids) for choice in prompt.choices)
        spent = max(self._progress.format_dict["elapsed"], 1e-6)
        read, written = self._prompt_tokens / spent, self._output_tokens / spent
        self._progress.set_postfix_str(f"input: {read:.0f} tok/s, output: {written:.0f} tok/s", refresh=False)
        self._progress.update()


def _listed(prompts: PromptType | Sequence[PromptType]) -> list[PromptType]:
    """Return a list of prompts, whether one was given or many."""
    if isinstance(prompts, str | Mapping):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise InvalidRequestError("prompts must be a prompt or a list of prompts", param="prompts")
    listed: list[Any] = list(prompts)
    return [listed] if listed and all(type(token) is int for token in listed) else listed


def _conversations(messages: Conversation | Sequence[Conversation]) -> list[Conversation]:
    """Return a list of conversations, whether one was given or many."""
    listed: list[Any] = list(messages)
    return [listed] if listed and isinstance(listed[0], Mapping) else listed


def _params_of(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> list[SamplingParams]:
    if sampling_params is None:
        return [SamplingParams()] * count
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * count
    if len(sampling_params) != count:
        raise InvalidRequestError(
            f"sampling_params: {len(sampling_params)} given for {count} prompts", param="sampling_params"
        )
    return list(sampling_params)


def _result(prompt: _Prompt) -> RequestOutput:
    return RequestOutput(
        request_id=prompt.choices[0].request.request_id,
        prompt=prompt.text,
        prompt_token_ids=prompt.token_ids,
        outputs=tuple(choice.output(index) for index, choice in enumerate(prompt.choices)),
        num_cached_tokens=min(choice.assembler.num_cached_tokens for choice in prompt.choices),
    )
