"""Chat templates that behave like those of the named families, written for the tests and much shorter."""

PROMPT = "{% if add_generation_prompt %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    + PROMPT
    + "<|im_start|>assistant\n{% endif %}"
)
# Qwen2.5: tools, and tool calls as objects
CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}" + PROMPT + "<|im_start|>assistant\n{% endif %}"
)
# DeepSeek: arguments are JSON text already
TEXT_ARGUMENTS = CHATML_TOOLS.replace("{{ c.function.arguments | tojson }}", "{{ '' + c.function.arguments }}")
# Llama 3: today's date, contents trimmed, tool results under the role ipython and quoted
LLAMA3 = (
    "{{ bos_token }}<|start|>system<|end|>\n\nToday: {{ strftime_now('%d %b %Y') }}<|eot|>{% for m in messages %}"
    "{% if m.role in ('tool', 'ipython') %}<|start|>ipython<|end|>\n\n{{ m.content | tojson }}<|eot|>"
    "{% else %}<|start|>{{ m.role }}<|end|>\n\n{{ m.content | trim }}<|eot|>{% endif %}{% endfor %}"
    + PROMPT
    + "<|start|>assistant<|end|>\n\n{% endif %}"
)
# Mistral: strict alternation, the system message in front of the last question
MISTRAL = (
    "{% set ns = namespace(system='', n=0, last=-1) %}{% if messages[0].role == 'system' %}"
    "{% set ns.system = messages[0].content %}{% set rest = messages[1:] %}{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user and assistant') }}{% endif %}{% if m.role == 'user' %}"
    "[INST] {% if ns.system and loop.index0 == ns.last %}{{ ns.system }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content | trim }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Gemma: the assistant is called model, and there is no system message
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<|start|>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<|turn|>\n{% endfor %}"
    + PROMPT
    + "<|start|>model\n{% endif %}"
)
# Phi-3: ends in EOS unless an answer is asked for, and drops what has another role
PHI3 = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endif %}"
    "{% endfor %}" + PROMPT + "<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content + eos_token }}\n{% endfor %}"
    + PROMPT
    + "<|assistant|>\n{% endif %}"
)
# DeepSeek-R1: opens the reasoning, which the rendering of answers leaves out
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% else %}"
    "<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    + PROMPT
    + "<|assistant|><think>\n{% endif %}"
)
# Qwen3: an empty thought in answers to the last question only
QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set thought = m.reasoning_content or '' %}{% set said = m.content %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1] %}{% set said = said.split('</think>')[-1] %}"
    "{% endif %}{% if loop.index0 > ns.last %}<think>\n{{ thought.strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ said.lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
    + PROMPT
    + "<|im_start|>assistant\n{% endif %}"
)
QWEN3_THINKING = QWEN3.replace(PROMPT + "<|im_start|>assistant\n", PROMPT + "<|im_start|>assistant\n<think>\n")
# GLM-4: what ends a turn is the token that the next one begins with
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    + PROMPT
    + "<|assistant|>\n{% endif %}"
)
# GLM-4.5: besides, earlier answers lose their reasoning
GLM_THINKING = (
    QWEN3.replace("<|im_end|>\n", "")
    .replace("<|im_start|>{{ m.role }}", "<|{{ m.role }}|>")
    .replace("<|im_start|>assistant", "<|assistant|>")
)
# Qwen3.5 without thinking: the generation prompt closes an empty thought
NOT_THINKING = QWEN3.replace(
    "<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif"
)
ALPACA = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}{{ '' if loop.last else '\n\n' }}{% endfor %}"
    + PROMPT
    + "{{ '\n\n' }}### assistant:\n{% endif %}"
)
# gpt-oss: channels, reasoning of the last answer only, and another end for the last answer than for earlier ones
HARMONY = (
    "<|start|>system<|message|>{{ strftime_now('%Y-%m-%d') }}<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% if m.tool_calls %}<|start|>assistant to={{ m.tool_calls[0].function.name }}<|message|>"
    "{{ m.tool_calls[0].function.arguments | tojson }}<|call|>{% elif loop.last %}{% if m.thinking %}"
    "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|return|>{% else %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}<|end|>{% endif %}{% else %}"
    "<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    + PROMPT
    + "<|start|>assistant{% endif %}"
)
