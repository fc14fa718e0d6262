"""Who vouches for a store: a signature of its manifest, beside it in ``manifest.sig``.

The manifest has the checksum of every shard's header, and headers those of all that is in the
shards, so that a signature of its bytes covers the store. Keys are Ed25519 (RFC 8032), by the
``cryptography`` package. Whoever writes a store has a private key
(``openssl genpkey -algorithm ed25519 -out key.pem``); whoever trains from it names the public one,
44 characters, in ``teachers.NAME.trusted``.
"""

from __future__ import annotations

import base64
import binascii
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_moe_inject.host.errors import Failure, RecipeError, fail, listing
from megatron_moe_inject.host.files import replace_file

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )


SIGNATURE = "manifest.sig"
_ALGORITHM = "ed25519"
_CONTEXT = b"megatron_moe_inject store manifest\n"
"""In front of what is signed, so that a signature of it is none of anything else."""
_LARGEST = 1 << 16


def check_package(key: str) -> None:
    """Raise RecipeError unless the ``cryptography`` package is there, which ``key`` asks for."""
    if importlib.util.find_spec("cryptography") is None:
        raise RecipeError(
            f"{key}: needs the cryptography package; pip install megatron-moe-inject[signed]", key
        )


def public_key(text: str, key: str) -> Ed25519PublicKey:
    """A public key as a recipe has it.

    Raises:
        RecipeError: it is none; ``key`` is where it stands.
    """
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        return Ed25519PublicKey.from_public_bytes(base64.b64decode(text, validate=True))
    except (ValueError, binascii.Error):
        raise fail(
            key, text, "is no Ed25519 public key",
            "write the 44 characters that moe-inject store-teacher --sign has printed",
        ) from None  # fmt: skip


def private_key(path: Path) -> Ed25519PrivateKey:
    """A private key of a PEM file without a password.

    Raises:
        RecipeError: it cannot be read or is none.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    remedy = "make one with openssl genpkey -algorithm ed25519 -out key.pem"
    try:
        found = load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        why = error.strerror if isinstance(error, OSError) else type(error).__name__
        raise fail("--sign", str(path), f"is no private key ({why})", remedy) from None
    if not isinstance(found, Ed25519PrivateKey):
        raise fail("--sign", str(path), "is a key of another kind", remedy)
    return found


def sign(manifest: Path, key: Ed25519PrivateKey) -> str:
    """Sign a manifest; the public key as text.

    Raises:
        RecipeError: the signature cannot be written.
    """
    public = base64.b64encode(key.public_key().public_bytes_raw()).decode()
    signature = key.sign(_CONTEXT + manifest.read_bytes())
    content = {
        "algorithm": _ALGORITHM,
        "public_key": public,
        "signature": base64.b64encode(signature).decode(),
    }
    replace_file(manifest.with_name(SIGNATURE), (json.dumps(content) + "\n").encode())
    return public


def check_signature(
    folder: Path, manifest: bytes, trusted: Sequence[str], key: str, failure: Failure
) -> None:
    """Refuse a store that nobody who is trusted has signed.

    Args:
        folder: of the store.
        manifest: what was read of it.
        trusted: public keys, any of which will do.
        key: where these stand, for messages.
        failure: makes errors about the store.

    Raises:
        RecipeError: a key that is none, no signature, one of somebody else, or one of another
            manifest.
    """
    from cryptography.exceptions import InvalidSignature

    check_package(key)
    known = {text: public_key(text, f"{key}[{i}]") for i, text in enumerate(trusted)}
    path = folder / SIGNATURE
    if not path.is_file():
        raise failure(
            f"is not signed, and {key} names who must have signed it",
            "have it signed by moe-inject store-teacher --sign KEY",
        )
    signer, signature = _read(path, failure)
    if signer not in known:
        raise failure(
            f"is signed by {signer}, and {key} trusts {listing(trusted, 4)}",
            "use a store of somebody you trust, or trust its signer",
        )
    try:
        known[signer].verify(signature, _CONTEXT + manifest)
    except InvalidSignature:
        raise failure(
            f"was changed after {signer} signed it, or is another store",
            "copy it again from its source",
        ) from None


def signer_of(folder: Path, failure: Failure) -> str | None:
    """Who says to have signed a store, which is not checked; None where nobody does.

    Raises:
        RecipeError: the signature is damaged.
    """
    path = folder / SIGNATURE
    return _read(path, failure)[0] if path.is_file() else None


def _read(path: Path, failure: Failure) -> tuple[str, bytes]:
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError
        content = json.loads(path.read_bytes())
        if content["algorithm"] != _ALGORITHM or not isinstance(content["public_key"], str):
            raise ValueError
        return content["public_key"], base64.b64decode(content["signature"], validate=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise failure(f"has a damaged {path.name}", "copy it again") from None
