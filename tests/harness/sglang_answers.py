"""Run by a Python that has vLLM: SGLang's own code reads our requests, and writes its numbers

Reads JSON from standard input: ``{"source": ..., "cases": [{"request": ..., "values": ...,
"ids": ..., "top": ...}]}``; ``source`` is where SGLang's wheel was unpacked. Its contract for
``/generate`` is imported as it is; the functions that write flat log-probabilities are taken out
of its modules, which import its engine. Prints one line of JSON for each: what the contract objects
to, and the fields of ``meta_info``.
"""

import ast
import importlib.util
import json
import sys
import typing
from pathlib import Path


def main() -> None:
    given = json.load(sys.stdin)
    source = f"{given['source']}/sglang"
    spec = importlib.util.spec_from_file_location("api_types", f"{source}/api/v1/api_types.py")
    contract = importlib.util.module_from_spec(spec)
    sys.modules["api_types"] = contract
    spec.loader.exec_module(contract)
    functions = _functions(f"{source}/srt/managers/io_struct.py", "flat_top_logprobs")
    functions |= _functions(f"{source}/srt/managers/tokenizer_manager.py", "flat_top_logprobs")
    _link(functions)
    for case in given["cases"]:
        problem = None
        try:
            contract.GenerateRequest.from_json_value(case["request"])
        except contract.JsonContractError as error:
            problem = str(error)
        fields = functions["_build_flat_top_logprobs_fields"](
            "input", case["values"], case["ids"], case["top"], return_b64=True
        )
        print(json.dumps({"problem": problem, "fields": fields}))


def _functions(path: str, named: str) -> dict:
    """Functions of a module whose name has a part, compiled by themselves."""
    import numpy
    import pybase64

    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef) and named in n.name]
    names = {**vars(typing), "np": numpy, "pybase64": pybase64}
    exec(compile(ast.Module(wanted, []), path, "exec"), names)
    return {node.name: names[node.name] for node in wanted}


def _link(functions: dict) -> None:
    """Let functions of several modules find each other."""
    for function in functions.values():
        function.__globals__.update(functions)


if __name__ == "__main__":
    main()
