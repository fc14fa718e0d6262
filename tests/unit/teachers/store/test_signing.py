"""A store is used only if somebody who is trusted has signed it, and nothing was changed since."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytest.importorskip("cryptography")

from cryptography.hazmat.primitives.asymmetric import ec

from megatron_moe_inject.host.errors import RecipeError, fail
from megatron_moe_inject.teachers.store.manifest import MANIFEST, read_manifest
from megatron_moe_inject.teachers.store.signing import SIGNATURE, private_key, sign, signer_of
from tests.harness.stores import key_file, write

KEY = "teachers.coder.trusted"


def failure(problem, remedy):
    return fail("teachers.coder.source", "store:/s", problem, remedy)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed") / "store"
    write(folder)
    return folder


@pytest.fixture
def signed(whole, tmp_path):
    """A store and the public key of its signer."""
    folder = Path(shutil.copytree(whole, tmp_path / "store"))
    return folder, sign(folder / MANIFEST, private_key(key_file(tmp_path)))


def refused(folder, trusted, message):
    with pytest.raises(RecipeError, match=message) as error:
        read_manifest(folder, failure, trusted, KEY)
    assert "\n" not in str(error.value)


def test_whoever_is_trusted_has_signed_it(signed, tmp_path):
    folder, signer = signed
    assert len(signer) == 44
    assert signer_of(folder, failure) == signer
    other = (
        sign(tmp_path / "x", private_key(key_file(tmp_path)))
        if (tmp_path / "x").write_text("y")
        else ""
    )
    assert read_manifest(folder, failure, [other, signer], KEY).rows
    assert read_manifest(folder, failure, [], KEY).rows
    refused(folder, [other], f"is signed by {re.escape(signer)}, and {KEY} trusts")


def test_without_a_signature_it_is_refused_where_somebody_is_trusted(signed):
    folder, signer = signed
    (folder / SIGNATURE).unlink()
    assert signer_of(folder, failure) is None
    refused(folder, [signer], f"is not signed, and {KEY} names who must have signed it; have it")


def test_every_change_of_the_manifest_is_found(signed):
    folder, signer = signed
    content = (folder / MANIFEST).read_bytes()
    for place in range(0, len(content), 97):
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / MANIFEST).write_bytes(changed)
        refused(folder, [signer], "was changed after .* signed it, or is another store; copy it")
    (folder / MANIFEST).write_bytes(content + b" ")
    refused(folder, [signer], "was changed after")


def test_a_changed_signature_is_none(signed):
    folder, signer = signed
    content = json.loads((folder / SIGNATURE).read_text())
    mirrored = content["signature"][::-1].lstrip("=") + "=="
    (folder / SIGNATURE).write_text(json.dumps(content | {"signature": mirrored}))
    refused(folder, [signer], "was changed after")
    for noise in ("", "{}", "[1]", json.dumps(content | {"algorithm": "none"}), "\x00"):
        (folder / SIGNATURE).write_text(noise)
        refused(folder, [signer], "has a damaged manifest.sig; copy it again")


def test_a_signature_is_of_this_store_alone(signed, tmp_path):
    folder, signer = signed
    write(tmp_path / "other", limit=10**9)
    manifest = json.loads((tmp_path / "other" / MANIFEST).read_text())
    manifest["plan"]["teacher"]["source"] = "hf:/evil"
    (tmp_path / "other" / MANIFEST).write_text(json.dumps(manifest))
    shutil.copy(folder / SIGNATURE, tmp_path / "other")
    refused(tmp_path / "other", [signer], "was changed after .* or is another store")


@pytest.mark.parametrize("text", ["", "abc", "A" * 44, "é" * 44, "A" * 42 + "=="])
def test_keys_that_are_none(signed, text):
    refused(
        signed[0], [text], rf"^{re.escape(KEY)}\[0\]: .* is no Ed25519 public key; write the 44"
    )


def test_private_keys_that_are_none(tmp_path):
    remedy = "openssl genpkey -algorithm ed25519"
    for content in (b"", b"-----BEGIN PRIVATE KEY-----\nAA==\n-----END PRIVATE KEY-----\n"):
        (tmp_path / "key").write_bytes(content)
        with pytest.raises(RecipeError, match=f"--sign: .* is no private key .*{remedy}"):
            private_key(tmp_path / "key")
    with pytest.raises(RecipeError, match=r"is no private key \(No such file"):
        private_key(tmp_path / "none")
    with pytest.raises(RecipeError, match="is a key of another kind"):
        private_key(key_file(tmp_path, ec.generate_private_key(ec.SECP256R1())))
