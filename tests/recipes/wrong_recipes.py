# ruff: noqa: E501
"""Invalid recipes: ``(name, text, fragment)``. The error message contains ``fragment``; ``bytes`` are not valid text.

The fixture ``wrong_recipe`` of ``tests/conftest.py`` runs a test for each of them.
"""

from __future__ import annotations

HEAD = "version: 1\ndim: 64\nvocab: 256\n"
PLAIN = HEAD + "layers:\n  plain: [attention, ffn]\nstack: [plain]\n"


def with_layer(blocks: str, stack: str = "[mac]") -> str:
    return f"{HEAD}layers:\n  mac: {blocks}\nstack: {stack}\n"


def with_stack(stack: str) -> str:
    return f"{HEAD}layers:\n  plain: [attention, ffn]\n  mac: [memory]\nstack: {stack}\n"


def nested_flow(depth: int) -> str:
    return "[" * depth + "]" * depth


def alias_bomb() -> str:
    lines = ['a0: &a0 ["x", "x", "x", "x", "x", "x", "x", "x", "x", "x"]']
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12)]
    return PLAIN + "\n".join(lines) + "\n"


WRONG: list[tuple[str, str | bytes, str]] = [
    # misspelt and unknown names
    ("misspelt field", with_layer("[{type: memory, depht: 2}]"), "layers.mac.0.depht: unknown field of memory; did you mean 'depth'?"),
    (
        "misspelt field of a nested block",
        with_layer("[{type: context, memory: {type: memory, depht: 2}}]"),
        "layers.mac.0.memory.depht: unknown field of memory; did you mean 'depth'?",
    ),
    ("misspelt block", with_layer("[memroy]"), "layers.mac.0: unknown block 'memroy'; did you mean 'memory'?"),
    ("misspelt type", with_layer("[{type: atention, heads: 4}]"), "layers.mac.0.type: unknown block 'atention'; did you mean 'attention'?"),
    ("wrong case", with_layer("[Memory]"), "did you mean 'memory'?"),
    ("unknown block", with_layer("[flux_capacitor]"), "unknown block 'flux_capacitor'"),
    ("misspelt choice", with_layer("[{type: context, write: atended}]"), "layers.mac.0.write: expected 'attended' or 'inputs', got 'atended'"),
    ("misspelt layer in the stack", with_stack("[plain, mca]"), "stack.1: unknown layer 'mca'; did you mean 'mac'?"),
    ("misspelt key at the top", PLAIN.replace("stack", "stcak"), "stcak: unknown key; did you mean 'stack'?"),
    ("misspelt key type", with_layer("[{tpye: memory}]"), "a block needs a type, got {'tpye': 'memory'}; did you mean 'type'?"),
    ("field of a block that has none such", with_layer("[{type: memory, segment: 64}]"), "layers.mac.0.segment: unknown field of memory"),
    ("import path as a name", with_layer("[titans_build.blocks.memory.NeuralMemory]"), "unknown block"),
    # structure
    ("unused layer", with_stack("[plain]"), "layers.mac: the layer is not in the stack"),
    ("no layers", HEAD + "stack: [plain]\n", "the recipe needs 'layers'"),
    ("no stack", HEAD + "layers: {plain: [ffn]}\n", "the recipe needs 'stack'"),
    ("no dim", PLAIN.replace("dim: 64\n", ""), "the recipe needs 'dim'"),
    ("no version", PLAIN.replace("version: 1\n", ""), "the recipe needs 'version'"),
    ("layers as a list", HEAD + "layers: [ffn]\nstack: [a]\n", "layers: expected a mapping of layer names to lists of blocks, got ['ffn']"),
    ("layers as text", HEAD + "layers: |\n  a: [ffn]\nstack: [a]\n", "layers: expected a mapping of layer names"),
    ("layer without blocks", HEAD + "layers: {a: null}\nstack: [a]\n", "layers.a: expected a list of blocks, got null"),
    ("layer that is a name", HEAD + "layers: {a: ffn}\nstack: [a]\n", "layers.a: expected a list of blocks, got 'ffn'"),
    ("layer without a name", HEAD + "layers: {'': [ffn]}\nstack: ['']\n", "layers.'': a layer's name starts with a letter"),
    ("layer of a long name", HEAD + "layers: {" + "a" * 300 + ": [ffn]}\nstack: [" + "a" * 300 + "]\n", "a layer's name starts with a letter"),
    ("layer in other letters", HEAD + "layers: {größe: [ffn]}\nstack: [größe]\n", "layers.'größe': a layer's name"),
    ("stack null", HEAD + "layers: {a: [ffn]}\nstack:\n", "stack: expected a list of layer names and {repeat: n, of: [...]}, got null"),
    ("stack that is a repeat", HEAD + "layers: {a: [ffn]}\nstack: {repeat: 2, of: [a]}\n", "stack: expected a list of layer names"),
    ("list in the stack", with_stack("[[plain], mac]"), "stack.0: expected a layer's name or {repeat: n, of: [...]}, got ['plain']"),
    ("null in the stack", with_stack("[plain, mac, null]"), "stack.2: expected a layer's name"),
    ("repeat of a name", with_stack("[plain, {repeat: 2, of: mac}]"), "stack.1.of: expected a list of layer names"),
    ("repeat as a fraction", with_stack("[plain, {repeat: 2.0, of: [mac]}]"), "stack.1.repeat: expected an integer >= 1, got 2.0"),
    ("a block's name for its key", with_layer("[{memory: {depth: 2}}]"), "layers.mac.0: a block needs a type, got {'memory': {'depth': 2}}; a block is written {type: memory, ...}"),
    ("a block's name with a colon", with_layer("\n    - memory:"), "a block is written {type: memory, ...}"),
    ("empty mapping for a block", with_layer("[{}]"), "layers.mac.0: a block needs a type, got {}"),
    ("type null", with_layer("[{type: null}]"), "layers.mac.0.type: expected the name of a block, got null"),
    ("type as a list", with_layer("[{type: [memory]}]"), "layers.mac.0.type: expected the name of a block, got ['memory']"),
    ("empty name of a block", with_layer("['']"), "layers.mac.0: unknown block ''"),
    ("key with a path in it", PLAIN + "layers.mac: 3\n", "'layers.mac': unknown key"),
    ("empty layers", HEAD + "layers: {}\nstack: []\n", "layers: expected a mapping of layer names"),
    ("empty stack", with_stack("[]"), "stack: expected a list of layer names"),
    ("empty layer", with_layer("[]"), "layers.mac: expected a list of blocks, got []"),
    ("layer that is no list", with_layer("{type: memory}"), "layers.mac: expected a list of blocks"),
    ("stack that is a name", with_stack("plain"), "stack: expected a list of layer names"),
    ("stack of numbers", with_stack("[1, 2]"), "stack.0: expected a layer's name"),
    ("null block", with_layer("[null]"), "layers.mac.0: expected a block (a name, a mapping with a type, or a list), got null"),
    ("number for a block", with_layer("[3]"), "layers.mac.0: expected a block"),
    ("empty chain", with_layer("[[]]"), "layers.mac.0: an empty list of blocks"),
    ("list at the top", "- memory\n- ffn\n", "expected a mapping"),
    ("text at the top", "just: a\nsentence\n", "not valid YAML"),
    ("layer named with a dot", PLAIN.replace("plain", "a.b"), "a layer's name starts with a letter"),
    ("missing field", with_layer("[{type: persistent, tokens: 4}]"), "layers.mac.0: persistent needs the field 'of'"),
    ("one branch", with_layer("[{type: gate, branches: [attention]}]"), "layers.mac.0.branches: "),
    ("dim inside a block", with_layer("[{type: memory, dim: 64}]"), "layers.mac.0.dim: the width is given once"),
    ("attention as a memory", with_layer("[{type: context, memory: attention}]"), "layers.mac.0.memory: expected a block with read and write (memory"),
    ("chain with an ffn as a memory", with_layer("[{type: context, memory: [memory, ffn]}]"), "layers.mac.0.memory.1: expected a block with read and write (memory, self_modifying; or chain,"),
    ("attention behind persistent tokens as a memory", with_layer("[{type: context, memory: {type: persistent, of: attention}}]"), "layers.mac.0.memory.of: expected a block with read and write (memory"),
    ("null where a block is needed", with_layer("[{type: context, attend: null}]"), "layers.mac.0.attend: expected a block"),
    # repeat
    ("repeat zero", with_stack("[plain, mac, {repeat: 0, of: [mac]}]"), "stack.2.repeat: expected an integer >= 1, got 0"),
    ("repeat negative", with_stack("[plain, {repeat: -3, of: [mac]}]"), "stack.1.repeat: expected an integer >= 1, got -3"),
    ("repeat true", with_stack("[plain, {repeat: true, of: [mac]}]"), "stack.1.repeat: expected an integer >= 1, got true"),
    ("repeat text", with_stack("[plain, {repeat: many, of: [mac]}]"), "stack.1.repeat: expected an integer >= 1, got 'many'"),
    ("repeat of nothing", with_stack("[plain, mac, {repeat: 2}]"), "stack.2.of: expected a list"),
    ("repeat of an empty list", with_stack("[plain, mac, {repeat: 2, of: []}]"), "stack.2.of: expected a list"),
    ("of without repeat", with_stack("[plain, {of: [mac]}]"), "stack.1.repeat: expected an integer >= 1, got null"),
    ("unknown key beside repeat", with_stack("[plain, {repeat: 2, of: [mac], off: 1}]"), "stack.1.off: unknown key"),
    ("unknown layer in a nested repeat", with_stack("[plain, mac, {repeat: 2, of: [{repeat: 3, of: [mcc]}]}]"), "stack.2.of.0.of.0: unknown layer 'mcc'; did you mean 'mac'?"),
    ("repeat bomb", with_stack("[plain, mac, {repeat: 1000000, of: [{repeat: 1000000, of: [mac]}]}]"), "at most 1024 are allowed"),
    ("repeat beyond 64 bits", with_stack(f"[plain, mac, {{repeat: {10**25}, of: [mac]}}]"), "too large"),
    # values
    ("heads that do not divide", with_layer("[{type: attention, heads: 5}]"), "layers.mac.0.heads: "),
    ("memory heads that do not divide", with_layer("[{type: memory, heads: 7}]"), "layers.mac.0.heads: 7 heads do not divide the width 64"),
    ("heads zero", with_layer("[{type: attention, heads: 0}]"), "layers.mac.0.heads: expected integer >= 1, got 0"),
    ("heads as text", with_layer("[{type: attention, heads: '4'}]"), "layers.mac.0.heads: expected integer >= 1, got '4'"),
    ("heads as a fraction", with_layer("[{type: attention, heads: 4.0}]"), "layers.mac.0.heads: expected integer >= 1, got 4.0"),
    ("heads as truth", with_layer("[{type: attention, heads: true}]"), "layers.mac.0.heads: expected integer >= 1, got true"),
    ("heads as null", with_layer("[{type: attention, heads: null}]"), "layers.mac.0.heads: expected integer >= 1, got null"),
    ("heads as a list", with_layer("[{type: attention, heads: [4]}]"), "layers.mac.0.heads: expected integer >= 1, got [4]"),
    ("truth as a number", with_layer("[{type: memory, momentum: 1}]"), "layers.mac.0.momentum: expected true or false, got 1"),
    ("truth as a word", with_layer("[{type: memory, momentum: yes}]"), "layers.mac.0.momentum: expected true or false, got 'yes'"),
    ("segment negative", with_layer("[{type: context, segment: -1}]"), "layers.mac.0.segment: expected integer from 1 to 1048576, got -1"),
    ("depth too large", with_layer("[{type: memory, depth: 1000}]"), "layers.mac.0.depth: "),
    ("dim zero", PLAIN.replace("dim: 64", "dim: 0"), "dim: expected an integer from 1 to"),
    ("dim as a fraction", PLAIN.replace("dim: 64", "dim: 64.0"), "dim: expected an integer from 1 to 131072, got 64.0"),
    ("dim quoted", PLAIN.replace("dim: 64", "dim: '64'"), "dim: expected an integer from 1 to 131072, got '64'"),
    ("dim with a unit", PLAIN.replace("dim: 64", "dim: 64k"), "dim: expected an integer from 1 to 131072, got '64k'"),
    ("kv_heads that do not divide", with_layer("[{type: attention, heads: 4, kv_heads: 3}]"), "layers.mac.0.kv_heads: expected a divisor of heads = 4, got 3"),
    ("rotations of an odd width", HEAD.replace("64", "60") + "layers: {a: [{type: attention, heads: 20}]}\nstack: [a]\n", "layers.a.0.rope: expected null, or heads of even width"),
    ("27 branches", with_layer(f"[{{type: gate, branches: [{', '.join(['ffn'] * 27)}]}}]"), "layers.mac.0.branches: expected at most 26 blocks, got 27"),
    ("branches by name", with_layer("[{type: gate, branches: {a: attention, b: memory}}]"), "layers.mac.0.branches: expected list of block"),
    ("hidden beyond any tensor", with_layer("[{type: ffn, hidden: 4611686018427387904}]"), "layers.mac.0.hidden: expected integer from 1 to"),
    ("context for a memory", with_layer("[{type: context, memory: {type: context}}]"), "layers.mac.0.memory: expected a block with read and write"),
    ("name of two lines", PLAIN + 'name: "a\\nb"\n', "name: expected a line of text, got 'a\\nb'"),
    ("name that turns the line round", PLAIN + 'name: "\\u202eabc"\n', "name: expected a line of text, got '\\u202eabc'"),
    ("name of half a character", PLAIN + 'name: "\\ud800"\n', "name: expected a line of text, got '\\ud800'"),
    ("dim text", PLAIN.replace("dim: 64", "dim: wide"), "dim: expected an integer from 1 to 131072, got 'wide'"),
    ("dim huge", PLAIN.replace("dim: 64", "dim: 1000000000"), "dim: expected an integer from 1 to"),
    ("dim of 5000 digits", PLAIN.replace("dim: 64", "dim: 1" + "0" * 5000), "dim: an integer of 5001 digits is too large"),
    ("vocab zero", PLAIN.replace("vocab: 256", "vocab: 0"), "vocab: expected an integer from 1 to"),
    ("tie without vocab", PLAIN.replace("vocab: 256", "tie: true"), "tie: there is no embedding"),
    ("tie as text", PLAIN.replace("vocab: 256", "vocab: 256\ntie: 'true'"), "tie: expected true or false, got 'true'"),
    ("version 2", PLAIN.replace("version: 1", "version: 2"), "version: expected 1, got 2; a newer titans-build wrote it"),
    ("version as a fraction", PLAIN.replace("version: 1", "version: 1.0"), "version: expected 1, got 1.0"),
    ("version as text", PLAIN.replace("version: 1", "version: '1'"), "version: expected 1, got '1'"),
    ("version null", PLAIN.replace("version: 1", "version:"), "version: expected 1, got null"),
    ("version true", PLAIN.replace("version: 1", "version: true"), "version: expected 1, got true"),
    ("not a number", with_layer("[{type: memory, max_step: .nan}]"), "layers.mac.0.max_step: expected a finite number, got nan"),
    ("infinite", with_layer("[{type: memory, max_step: .inf}]"), "layers.mac.0.max_step: expected a finite number, got inf"),
    ("infinite by exponent", with_layer("[{type: memory, max_step: 1e999}]"), "layers.mac.0.max_step: expected a finite number"),
    # text
    ("empty", "", "empty"),
    ("blank", "\n\n  \n", "empty"),
    ("comment alone", "# nothing here\n", "empty"),
    ("two documents", PLAIN + "---\n" + PLAIN, "more than one document"),
    ("duplicate key", PLAIN + "dim: 128\n", "dim: the key is given twice, on lines 2 and 7"),
    ("duplicate layer", HEAD + "layers:\n  plain: [ffn]\n  plain: [attention]\nstack: [plain]\n", "layers.plain: the key is given twice, on lines 5 and 6"),
    ("duplicate field", with_layer("[{type: memory, depth: 2, depth: 3}]"), "layers.mac.0.depth: the key is given twice"),
    ("duplicate in json", '{"version": 1, "dim": 64, "dim": 32, "layers": {"a": ["ffn"]}, "stack": ["a"]}', "dim: the key is given twice"),
    ("thousands of digits in json", '{"version": 1, "dim": ' + "9" * 6000 + "}", "dim: an integer of 6000 digits is too large"),
    ("text after json", '{"version": 1, "dim": 64} x', "not valid YAML: line 1"),
    ("not a number in json", '{"version": 1, "dim": NaN}', "dim: expected a finite number, got nan"),
    ("a page of the web", "<!DOCTYPE html><html><body>Not Found</body></html>\n", "expected a mapping with the keys version, dim, layers, stack"),
    ("another kind of settings", "[recipe]\ndim = 64\n", "not valid YAML: line 2"),
    ("a character beyond the last", PLAIN + 'name: "\\U00110000"\n', "not valid YAML"),
    ("many documents", "---\n" * 30_000, "more than one document"),
    ("a later YAML", "%YAML 3.0\n---\n" + PLAIN, "not valid YAML"),
    ("persistent in persistent in ...", with_layer("[" + "{type: persistent, tokens: 1, of: " * 40 + "memory" + "}" * 40 + "]"), "blocks are nested more than 32 deep"),
    ("broken json", '{"version": 1, "dim": 64,\n', "not valid YAML"),
    ("broken yaml", HEAD + "layers: [unclosed\n", "not valid YAML: line"),
    ("bad indentation", HEAD + "layers:\n  a: [ffn]\n b: [ffn]\nstack: [a]\n", "not valid YAML: line 6"),
    ("tab", HEAD + "layers:\n\tplain: [ffn]\nstack: [plain]\n", "not valid YAML: line 5"),
    ("python tag", with_layer("[!!python/object/apply:os.system ['true']]"), "tags are not allowed"),
    ("custom tag", with_layer("[!memory {depth: 2}]"), "layers.mac.0: tags are not allowed, got '!memory'"),
    ("merge key", "base: &base {type: memory}\n" + with_layer("[{<<: *base, depth: 2}]"), "merge keys"),
    ("number for a key", HEAD + "layers:\n  1: [ffn]\nstack: [1]\n", "expected keys to be text, got 1"),
    ("list for a key", HEAD + "layers:\n  ? [a, b]\n  : [ffn]\nstack: [a]\n", "expected keys to be text"),
    ("unknown alias", with_layer("[*nothing]"), "alias"),
    ("alias to itself", with_layer("&loop [*loop]"), "is inside the value that it names"),
    ("alias bomb", alias_bomb(), "aliases counted in full"),
    ("deep lists", HEAD + "layers: " + nested_flow(5000) + "\nstack: [a]\n", "nested more than"),
    ("deep blocks", with_layer("[" + nested_flow(40) + "]"), "nested more than"),
    ("deep json", '{"a": ' * 3000 + "1" + "}" * 3000, "nested more than"),
    ("many values", with_layer("[" + "ffn, " * 30_000 + "ffn]"), "not a recipe"),
    ("many blocks", with_layer("[" + "ffn, " * 5_000 + "ffn]"), "more than 1024 blocks"),
    ("many problems", with_layer("[" + ", ".join(f"fn{i}" for i in range(5_000)) + "]"), "more"),
    ("many unknown fields", with_layer("[{type: memory, " + ", ".join(f"depth{i}: 1" for i in range(5_000)) + "}]"), "unknown field of memory"),
    ("too large", PLAIN + "# " + "x" * 400_000 + "\n", "larger than 128 KiB"),
    ("long name", with_layer("[" + "m" * 100_000 + "]"), "unknown block"),
    ("control character", with_layer("[mem\x07ory]"), "not text"),
    ("escape sequence in a name", with_layer('["\\e[2Jmemory"]'), "unknown block"),
    ("not UTF-8", PLAIN.encode() + b"name: caf\xe9\n", "not UTF-8 text: byte 0xe9 at offset"),
    ("UTF-16", PLAIN.encode("utf-16"), "not UTF-8 text"),
    ("binary", bytes(range(256)) * 4, "not UTF-8 text"),
    ("zero bytes", b"\x00" * 100, "not text"),
    # imports
    ("import that was not allowed", "imports: [os]\n" + PLAIN, "imports: the recipe asks to import os"),
    ("import of a path", "imports: ['../evil.py']\n" + PLAIN, "imports.0: expected the name of a module"),
    ("imports as text", "imports: os\n" + PLAIN, "imports: expected a list of modules"),
]  # fmt: skip
