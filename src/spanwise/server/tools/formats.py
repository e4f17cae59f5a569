"""The formats that are known, and how each is told from a chat template's text."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from spanwise.server.tools import deepseek, glm, harmony, mistral, pythonic, qwen3_coder
from spanwise.server.tools.call import Thinking
from spanwise.server.tools.deepseek import DeepSeekCalls
from spanwise.server.tools.glm import GlmCalls
from spanwise.server.tools.harmony import HarmonyCalls
from spanwise.server.tools.json_calls import JsonCalls
from spanwise.server.tools.mistral import MistralCalls
from spanwise.server.tools.pythonic import PythonicCalls
from spanwise.server.tools.qwen3_coder import Qwen3CoderCalls
from spanwise.server.tools.tool_format import ToolFormat


@dataclass(frozen=True)
class _Known:
    """A format, and texts that every template which teaches it holds."""

    tool_format: ToolFormat
    texts: tuple[str, ...]


HERMES = JsonCalls(
    name="hermes",
    openings=("<tool_call>",),
    closing="</tool_call>",
    before="<tool_call>\n",
    between="\n",
    after="\n</tool_call>",
    each=True,
    marks=("<tool_call>", "</tool_call>"),
)
QWEN3_CODER = Qwen3CoderCalls(
    name="qwen3_coder",
    openings=(qwen3_coder.BLOCK, qwen3_coder.FUNCTION),
    marks=qwen3_coder.MARKS,
)
GLM = GlmCalls(name="glm", openings=(glm.BLOCK,), marks=glm.MARKS, line="\n")
GLM_DENSE = replace(GLM, name="glm_dense", line="")
# Its template refuses a conversation with two calls in one message.
LLAMA_JSON = JsonCalls(
    name="llama_json",
    openings=("<|python_tag|>",),
    bare="{",
    arguments_key="parameters",
    marks=("<|python_tag|>",),
    single=True,
)
PYTHONIC = PythonicCalls(
    name="pythonic",
    openings=(pythonic.START,),
    bare="[",
    marks=(pythonic.START, pythonic.END),
)
MISTRAL_LIST = JsonCalls(
    name="mistral_list",
    openings=(mistral.OPENING,),
    before=f"{mistral.OPENING}[",
    after="]",
    marks=(mistral.OPENING,),
    short_ids=True,
)
MISTRAL = MistralCalls(
    name="mistral", openings=(mistral.OPENING,), marks=mistral.MARKS, short_ids=True
)
MISTRAL_WITH_IDS = replace(MISTRAL, name="mistral_with_ids", with_ids=True)
DEEPSEEK_V3 = DeepSeekCalls(
    name="deepseek_v3",
    openings=(deepseek.SECTION, deepseek.CALL),
    marks=deepseek.MARKS,
    before_name=f"{deepseek.CALL}function{deepseek.SEPARATOR}",
    after_name="\n```json\n",
    after=f"\n```{deepseek.CALL_END}",
    between="\n",
)
DEEPSEEK_V31 = replace(
    DEEPSEEK_V3,
    name="deepseek_v31",
    before_name=deepseek.CALL,
    after_name=deepseek.SEPARATOR,
    after=deepseek.CALL_END,
    between="",
)
PHI4_MINI = JsonCalls(
    name="phi4_mini",
    openings=("<|tool_call|>",),
    closing="<|/tool_call|>",
    before="<|tool_call|>[",
    after="]<|/tool_call|>",
    marks=("<|tool_call|>", "<|/tool_call|>"),
)
# What Phi-4-mini is told to write by templates that pass its tools on as text.
FUNCTOOLS = JsonCalls(name="functools", openings=("functools",), before="functools[", after="]")
GRANITE = JsonCalls(
    name="granite",
    openings=("<|tool_call|>", "<tool_call>"),
    before="<|tool_call|>[",
    after="]",
    marks=("<|tool_call|>",),
)
HARMONY = HarmonyCalls(
    name="harmony",
    openings=harmony.OPENINGS,
    bare=harmony.RECIPIENT,
    marks=harmony.MARKS,
    thinking=harmony.ANALYSIS,
)

# The first that fits: a format whose marks hold another's stands before it.
_KNOWN = (
    _Known(HARMONY, ("<|channel|>", "<|message|>", "<|call|>", "functions")),
    _Known(DEEPSEEK_V3, (deepseek.SECTION, deepseek.SEPARATOR, "```json")),
    _Known(DEEPSEEK_V31, (deepseek.SECTION, deepseek.SEPARATOR)),
    _Known(MISTRAL_WITH_IDS, ("[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")),
    _Known(MISTRAL, ("[TOOL_CALLS]", "[ARGS]")),
    _Known(MISTRAL_LIST, ("[TOOL_CALLS]",)),
    _Known(GLM, ("<tool_call>", "</arg_key>\n<arg_value>")),
    _Known(GLM_DENSE, ("<tool_call>", "</arg_key>", "<arg_value>")),
    _Known(QWEN3_CODER, ("<tool_call>", "<function=", "<parameter=")),
    _Known(HERMES, ("<tool_call>", "</tool_call>", "arguments")),
    _Known(PHI4_MINI, ("<|tool_call|>", "<|/tool_call|>")),
    _Known(FUNCTOOLS, ("functools[",)),
    _Known(GRANITE, ("<|tool_call|>", "<|start_of_role|>")),
    _Known(PYTHONIC, ("[func_name1(",)),
    _Known(LLAMA_JSON, ('{"name": function name, "parameters": ',)),
)
FORMATS = tuple(known.tool_format for known in _KNOWN)

_THINKING = (Thinking(), Thinking("[THINK]", "[/THINK]"))
_BLOCK = re.compile(r"\{[{%](.*?)[%}]\}", re.DOTALL)
_STRING = re.compile(r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\"", re.DOTALL)
_TOOLS = re.compile(r"(?<![\w.])tools\b")


def tool_format(template: str) -> ToolFormat | None:
    """The format that a chat template teaches its model; None for one that is not known.

    None too where the template never reads ``tools``: the model would not be shown any.
    """
    if not _reads_tools(template):
        return None
    for known in _KNOWN:
        if all(text in template for text in known.texts):
            return _with_thinking(known.tool_format, template)
    return None


def _reads_tools(template: str) -> bool:
    return any(_TOOLS.search(_STRING.sub("", code)) for code in _BLOCK.findall(template))


def _with_thinking(known: ToolFormat, template: str) -> ToolFormat:
    block = next((block for block in _THINKING if block.closing in template), None)
    return replace(known, thinking=known.thinking or block)
