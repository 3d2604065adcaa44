"""Signed pictures, read back by the C2PA library itself; certificates are made here."""

from __future__ import annotations

import datetime
import io
import json
import sys

import pytest
from PIL import Image

from sfumato.cli.app import run
from sfumato.errors import InputError
from sfumato.receipts.provenance import read_like, read_recipe
from sfumato.receipts.signing import open_signer
from sfumato.types import Result

c2pa = pytest.importorskip("c2pa")
x509 = pytest.importorskip("cryptography.x509")

from cryptography.hazmat.primitives import hashes, serialization  # noqa: E402
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: E402
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID  # noqa: E402

TRAINED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
COMPOSITE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
RECIPE = {
    "model": "small",
    "weights": {"denoiser": "ab" * 32},
    "sfumato": "0.1.0",
    "torch": "2.13.0",
    "python": "3.12.3",
    "kernels": {"deterministic": False, "cpu": "AVX512", "threads": 2},
    "loras": {"ink": "cd" * 32},
    "request": {"prompt": "a red cube", "seed": 3},
    "receipt": {"flops": {"denoise": 1.5e12}, "seconds": 0.25},
}
MIME = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}


def certificate(subject, key, issuer, issuer_key, *, authority=False, purpose=None, days=(-1, 30)):
    now = datetime.datetime.now(datetime.UTC)
    name = {
        text: x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Tests"),
                x509.NameAttribute(NameOID.COMMON_NAME, text),
            ]
        )
        for text in (subject, issuer)
    }
    usage = x509.KeyUsage(not authority, False, False, False, False, authority, authority, False, False)
    made = (
        x509.CertificateBuilder()
        .subject_name(name[subject])
        .issuer_name(name[issuer])
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + datetime.timedelta(days[0]))
        .not_valid_after(now + datetime.timedelta(days[1]))
        .add_extension(x509.BasicConstraints(authority, None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False)
        .add_extension(usage, True)
    )
    if not authority:
        made = made.add_extension(
            x509.ExtendedKeyUsage([purpose or ExtendedKeyUsageOID.EMAIL_PROTECTION]), False
        )
    return made.sign(issuer_key, hashes.SHA256())


def pem(certificate):
    return certificate.public_bytes(serialization.Encoding.PEM)


def key_pem(key, form=serialization.PrivateFormat.PKCS8, lock=None):
    return key.private_bytes(serialization.Encoding.PEM, form, lock or serialization.NoEncryption())


@pytest.fixture(scope="module")
def issued(tmp_path_factory):
    """A folder with root.pem, a chain of signer and middle, the signer's key, and what is wrong in one way each."""
    folder = tmp_path_factory.mktemp("certificates")
    root, middle, leaf, stranger = (ec.generate_private_key(ec.SECP256R1()) for _ in range(4))
    top = certificate("Root", root, "Root", root, authority=True)
    between = certificate("Middle", middle, "Root", root, authority=True)
    own = certificate("Signer", leaf, "Middle", middle)
    files = {
        "root": pem(top),
        "chain": pem(own) + pem(between),
        "key": key_pem(leaf, serialization.PrivateFormat.TraditionalOpenSSL),
        "other-key": key_pem(stranger),
        "locked": key_pem(leaf, lock=serialization.BestAvailableEncryption(b"secret")),
        "mixed": pem(own) + pem(top),
        "alone": pem(certificate("Self", leaf, "Self", leaf)),
        "old": pem(certificate("Signer", leaf, "Middle", middle, days=(-9, -1))) + pem(between),
        "web": pem(certificate("Signer", leaf, "Middle", middle, purpose=ExtendedKeyUsageOID.SERVER_AUTH))
        + pem(between),
        "text": b"nothing of the kind",
    }
    for kind, key in (
        ("p384", ec.generate_private_key(ec.SECP384R1())),
        ("rsa", rsa.generate_private_key(65537, 2048)),
        ("ed25519", ed25519.Ed25519PrivateKey.generate()),
        ("koblitz", ec.generate_private_key(ec.SECP256K1())),
    ):
        files[f"{kind}-chain"] = pem(certificate("Signer", key, "Middle", middle)) + pem(between)
        files[f"{kind}-key"] = key_pem(key)
    for name, data in files.items():
        (folder / f"{name}.pem").write_bytes(data)
    return folder


def signer(issued, chain="chain", key="key"):
    return open_signer(issued / f"{chain}.pem", issued / f"{key}.pem")


def read_back(path, root=None):
    """(validation state, active manifest) as the library sees a file, with or without trust in a root."""
    settings = {"verify": {"verify_trust": True}}
    if root is not None:
        settings["trust"] = {"trust_anchors": root.read_text()}
    with c2pa.Context.from_dict(settings) as context:
        told = json.loads(
            c2pa.Reader(MIME[path.suffix], io.BytesIO(path.read_bytes()), context=context).json()
        )
    return told["validation_state"], told["manifests"][told["active_manifest"]]


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_signed_picture_verifies_and_says_what_made_it(issued, tmp_path, suffix):
    picture = Image.new("RGB", (32, 24), (200, 40, 30))
    (path,) = Result((picture,), RECIPE).save(tmp_path / f"signed{suffix}", signer(issued))
    state, manifest = read_back(path, issued / "root.pem")
    assert state == "Trusted" and read_back(path)[0] == "Valid"
    assert manifest["signature_info"]["common_name"] == "Signer"
    held = {assertion["label"]: assertion["data"] for assertion in manifest["assertions"]}
    (action,) = held["c2pa.actions.v2"]["actions"]
    assert action["action"] == "c2pa.created" and action["digitalSourceType"] == TRAINED
    alone = RECIPE | {"request": RECIPE["request"] | {"count": 1}}
    found = read_recipe(path)
    assert held["sfumato.receipt"] == found == alone | {"drawn": found["drawn"]}
    assert read_like(path).request == alone["request"]
    with Image.open(path) as read:
        assert read.size == picture.size


def test_a_changed_pixel_breaks_the_seal(issued, tmp_path):
    (path,) = Result((Image.new("RGB", (64, 64), "gray"),), RECIPE).save(tmp_path / "a.png", signer(issued))
    data = bytearray(path.read_bytes())
    at = data.rindex(b"IDAT") + 12
    data[at] ^= 1
    path.write_bytes(data)
    assert read_back(path)[0] == "Invalid"


def test_what_began_with_a_picture_is_a_composite(issued, tmp_path):
    recipe = RECIPE | {"request": RECIPE["request"] | {"image": {"sha256": "00"}}}
    (path,) = Result((Image.new("RGB", (8, 8)),), recipe).save(tmp_path / "a.png", signer(issued))
    held = {a["label"]: a["data"] for a in read_back(path)[1]["assertions"]}
    assert held["c2pa.actions.v2"]["actions"][0]["digitalSourceType"] == COMPOSITE


@pytest.mark.parametrize("kind", ["p384", "rsa", "ed25519"])
def test_every_usual_kind_of_key_signs(issued, tmp_path, kind):
    sealed = signer(issued, f"{kind}-chain", f"{kind}-key")
    (path,) = Result((Image.new("RGB", (8, 8)),), RECIPE).save(tmp_path / "a.png", sealed)
    assert read_back(path, issued / "root.pem")[0] == "Trusted"


@pytest.mark.parametrize(
    ("chain", "key", "said"),
    [
        ("chain", "other-key", "does not belong"),
        ("chain", "locked", "passphrase"),
        ("chain", "text", "no private key"),
        ("chain", "absent", "cannot be read"),
        ("text", "key", "no certificate"),
        ("absent", "key", "cannot be read"),
        ("mixed", "key", "is not signed by the next one"),
        ("alone", "key", "signed by itself"),
        ("old", "key", "not today"),
        ("web", "key", "not made for signing"),
        ("koblitz-chain", "koblitz-key", "of a kind"),
    ],
)
def test_what_cannot_sign_is_refused_in_one_line_before_anything_is_drawn(
    issued, tmp_path, capsys, chain, key, said
):
    with pytest.raises(InputError, match=said):
        signer(issued, chain, key)
    files = [str(issued / f"{name}.pem") for name in (chain, key)]
    assert run(["generate", "a cube", "-o", str(tmp_path / "no.png"), "--sign", *files]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and said in line and line.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_without_the_extra_one_line_says_how_to_get_it(issued, monkeypatch):
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(InputError, match=r"pip install 'sfumato\[c2pa\]'"):
        signer(issued)


def test_a_drawn_picture_is_signed_and_replayed(issued, tmp_path, capsys):
    path = tmp_path / "cube.png"
    files = [str(issued / f"{name}.pem") for name in ("chain", "key")]
    assert run(["generate", "a red cube", "--steps", "1", "-o", str(path), "--sign", *files]) == 0
    state, manifest = read_back(path, issued / "root.pem")
    assert state == "Trusted"
    receipt = next(a["data"] for a in manifest["assertions"] if a["label"] == "sfumato.receipt")["receipt"]
    assert receipt == read_recipe(path)["receipt"] and receipt["flops"]
    assert run(["replay", str(path), "--verify"]) == 0
    assert "identical" in capsys.readouterr().out
