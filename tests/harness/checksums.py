"""Files of checksums."""

import hashlib
from pathlib import Path


def write_sums(folder: Path, name="SHA256SUMS") -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != name)
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()} *./{p.relative_to(folder)}" for p in files
    ]
    (folder / name).write_text("\n".join(lines) + "\n")
