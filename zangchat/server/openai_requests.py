"""The requests of OpenAI's API, with the fields that clients of other servers send as well."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from zangchat.config import USER_LIMITS
from zangchat.server.messages import Messages, Text
from zangchat.server.protocol import ApiError, Int, Sampling, Settings, limited

MAX_CHOICES = 64  # continuations that one request may ask for
SAMPLING = ("temperature", "top_k", "top_p", "min_p")

# Fields that change nothing here: of accounts, caches, priorities, of reasoning, which this model
# does not do, of the time that an answer takes, and details of switches that are refused if on.
IGNORED = {
    *("user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"),
    *("prompt_cache_key", "prompt_cache_retention", "stream_obfuscation", "include_obfuscation"),
    *("request_id", "priority", "keep_alive", "ttl", "prediction", "cache_prompt", "cache_salt"),
    *("id_slot", "n_keep", "draft_model", "timings_per_token", "return_progress"),
    *("reasoning", "reasoning_effort", "reasoning_format", "include_reasoning", "verbosity"),
    *("thinking", "think", "enable_thinking", "thinking_budget", "thinking_budget_tokens"),
    *("chat_template_kwargs", "parse_tool_calls", "spaces_between_special_tokens"),
    *("mirostat_tau", "mirostat_eta", "dynatemp_exponent", "xtc_threshold", "penalize_nl"),
    *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers"),
}
# Fields that would change the answer are refused, unless they have a value that means "off": one
# of these, or else false, "", [] or {}.
OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "response_format": ({"type": "text"}, {}),
    "modalities": (["text"], []),
    "web_search_options": (),  # {} is on
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "best_of": (1,),
    **dict.fromkeys(("length_penalty", "typical_p", "tfs_z"), (1,)),
    **dict.fromkeys(("min_tokens", "min_keep", "n_probs", "top_a", "no_repeat_ngram_size"), (0,)),
    **dict.fromkeys(("mirostat", "dynatemp_range", "xtc_probability", "dry_multiplier"), (0,)),
    **dict.fromkeys(("smoothing_factor", "epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("top_n_sigma", "repeat_last_n", "truncate_prompt_tokens"), (-1,)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
}


class Extensible(BaseModel):
    """A body whose further fields are checked one by one, so that none is silently ignored."""

    model_config = ConfigDict(extra="allow")

    def unsupported(self) -> list[str]:
        """The further fields that would change the answer."""
        extra = self.model_extra or {}
        return [name for name, value in extra.items() if not self.is_off(name, value)]

    def is_off(self, name: str, value: Any) -> bool:
        if name in IGNORED or value is None:
            return True
        if name == "logit_bias" and isinstance(value, dict):
            return not any(value.values())
        return value in OFF[name] if name in OFF else value is False or value in ("", [], {})


class StreamOptions(Extensible):
    include_usage: StrictBool | None = None


class OpenAIRequest(Sampling, Extensible):
    model: str | None = None  # any name: this server has one model, and the answer names it
    n: Int = Field(1, ge=1, le=MAX_CHOICES)
    stream: StrictBool = False
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def limit(self) -> int | None:
        return self.max_tokens

    def check(self) -> None:
        """Raises ApiError for fields that would have no effect."""
        unsupported = self.unsupported()
        if self.stream_options is not None:
            unsupported += [f"stream_options.{name}" for name in self.stream_options.unsupported()]
        if unsupported:
            names = ", ".join(unsupported)[:200]
            known = ", ".join(type(self).model_fields)
            message = f"this server does not support {names}; it takes {known}"
            raise ApiError(400, message, "unsupported_parameter", param=unsupported[0][:100])

    def defaults(self, settings: Settings) -> dict[str, float]:
        """The operator's, or OpenAI's for a request that chooses its own sampling."""
        if all(getattr(self, name) is None for name in SAMPLING):
            return super().defaults(settings)
        return {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


class OpenAIChat(OpenAIRequest):
    messages: Messages
    max_completion_tokens: Int | None = limited("max_tokens")
    logprobs: StrictBool = False
    top_logprobs: Int | None = limited("logprobs")
    truncate: StrictBool | None = None

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def is_off(self, name: str, value: Any) -> bool:
        extra = self.model_extra or {}
        switches = {"tools": "tool_choice", "functions": "function_call"}
        if name in switches and extra.get(switches[name]) == "none":
            return True
        if name in ("add_generation_prompt", "continue_final_message"):
            continues = self.messages[-1].role == "assistant"
            return continues or value is (name == "add_generation_prompt")
        return super().is_off(name, value)

    def check(self) -> None:
        super().check()
        if self.top_logprobs and not self.logprobs:
            message = "top_logprobs needs logprobs=true"
            raise ApiError(400, message, "invalid_request", param="top_logprobs")


Tokens = Annotated[list[StrictInt], Field(fail_fast=True)]


class OpenAICompletion(OpenAIRequest):
    prompt: (
        Text
        | Annotated[list[Text], Field(fail_fast=True, max_length=MAX_CHOICES)]
        | Tokens
        | Annotated[list[Tokens], Field(fail_fast=True, max_length=MAX_CHOICES)]
    ) = ""
    max_tokens: Int | None = Field(16, ge=0, le=USER_LIMITS["max_tokens"].most)
    echo: StrictBool = False
    logprobs: Int | None = limited("logprobs")

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return list(self.prompt)  # type: ignore[arg-type]

    def is_off(self, name: str, value: Any) -> bool:
        if name == "add_special_tokens":  # tokens get no <|bos|>, a text always does
            return value in (None, True) or not isinstance(self.prompts()[0], str)
        return (name == "best_of" and value == self.n) or super().is_off(name, value)

    def check(self) -> None:
        super().check()
        prompts = len(self.prompts())
        if prompts * self.n > MAX_CHOICES:
            limit = f"the {MAX_CHOICES} continuations of one request"
            message = f"{prompts} prompts x n={self.n} are more than {limit}"
            raise ApiError(400, message, "invalid_request", param="n")
