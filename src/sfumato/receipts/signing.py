"""Pictures signed after C2PA (spec 2.2): a manifest in the file, sealed with the maker's certificate.

The manifest says that a model made the picture (IPTC's digital source type), and holds the whole recipe: what was
drawn with what, and the receipt. Whoever changes a byte of the file breaks the seal. The recipe stays where it was, so
replay and --like read it as before.
"""

from __future__ import annotations

import datetime
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import InputError, SfumatoError
from sfumato.receipts.provenance import FORMATS, source_type

ASSERTION = "sfumato.receipt"  # the label of ours: the recipe, the receipt in it
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
RSA_BITS = 2048  # at least
PURPOSES = {  # of an extended key usage, one of which a signer must have (C2PA 2.2, 14.5.1.1)
    "1.3.6.1.5.5.7.3.4",  # e-mail protection
    "1.3.6.1.5.5.7.3.36",  # document signing
    "1.3.6.1.4.1.62558.2.1",  # C2PA claim signing
}
SETTINGS = {"builder": {"thumbnail": {"enabled": False}}}  # it would outweigh a small picture
EXTRA = "signing needs the extra c2pa: pip install 'sfumato[c2pa]'"


@dataclass(frozen=True)
class Signer:
    """A chain of certificates and its key, fit to sign. chain, key: PEM, the key as PKCS #8. algorithm: C2PA's name."""

    chain: str
    key: str
    algorithm: str
    subject: str

    def sign(self, data: bytes, suffix: str, recipe: dict[str, Any]) -> bytes:
        """The bytes of a picture file of this suffix, such as .png, with a sealed manifest. Raises `SfumatoError`."""
        c2pa = _c2pa()
        kind = MIME[FORMATS[suffix]]
        sealed = io.BytesIO()
        try:
            info = c2pa.C2paSignerInfo(self.algorithm, self.chain.encode(), self.key.encode(), None)
            with (
                c2pa.Context.from_dict(SETTINGS) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(manifest(recipe), context) as builder,
            ):
                builder.sign(signer, kind, io.BytesIO(data), sealed)
        except c2pa.C2paError as error:
            raise SfumatoError(f"the picture could not be signed as {self.subject}: {_line(error)}") from None
        return sealed.getvalue()


def open_signer(certificate: str | Path, key: str | Path) -> Signer:
    """Read a chain of certificates, the signer's first, and its private key, both PEM files.

    `InputError` when the extra is missing, a file is unreadable, the key is not the certificate's, the certificates are
    no chain, or one of them is not valid today or not made for signing.
    """
    _c2pa()
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    written, locked = _read(certificate, "certificate"), _read(key, "key")
    try:
        chain = x509.load_pem_x509_certificates(written)
    except ValueError:
        raise _bad(f"{certificate} holds no certificate in PEM form (-----BEGIN CERTIFICATE-----)") from None
    try:
        private = serialization.load_pem_private_key(locked, None)
    except TypeError:
        raise _bad(
            f"the key in {key} is locked with a passphrase; give one without: openssl pkcs8 -topk8 -nocrypt"
        ) from None
    except Exception:  # what a damaged key raises is the library's own
        raise _bad(f"{key} holds no private key in PEM form (-----BEGIN PRIVATE KEY-----)") from None
    _check_chain(chain, certificate)
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    if private.public_key().public_bytes(*form) != chain[0].public_key().public_bytes(*form):
        raise _bad(f"the key in {key} does not belong to the first certificate in {certificate}")
    return Signer(
        "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in chain),
        private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        _algorithm(private, key),
        chain[0].subject.rfc4514_string(),
    )


def manifest(recipe: dict[str, Any]) -> dict[str, Any]:
    """What is sealed: that the picture was made by a model, with what, and what it took."""
    from sfumato import __version__

    made = {
        "action": "c2pa.created",
        "digitalSourceType": source_type(recipe),
        "softwareAgent": {"name": "sfumato", "version": __version__},
    }
    return {
        "claim_generator_info": [{"name": "sfumato", "version": __version__}],
        "title": "picture",
        "assertions": [
            {"label": "c2pa.actions.v2", "data": {"actions": [made]}},
            {"label": ASSERTION, "data": recipe},
        ],
    }


def _check_chain(chain: Sequence[Any], path: str | Path) -> None:
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature

    now = datetime.datetime.now(datetime.UTC)
    for one in chain:
        name = one.subject.rfc4514_string()
        if not one.not_valid_before_utc <= now <= one.not_valid_after_utc:
            span = f"{one.not_valid_before_utc:%Y-%m-%d} to {one.not_valid_after_utc:%Y-%m-%d}"
            raise _bad(f"the certificate of {name} in {path} is valid from {span}, and not today")
    for one, above in itertools.pairwise(chain):
        try:
            one.verify_directly_issued_by(above)
        except (ValueError, TypeError, InvalidSignature):
            raise _bad(
                f"in {path} the certificate of {one.subject.rfc4514_string()} is not signed by the next one, "
                f"{above.subject.rfc4514_string()}; give the signer's first and each one's issuer after it"
            ) from None
    leaf = chain[0]
    if leaf.issuer == leaf.subject:
        raise _bad(
            f"the certificate in {path} is signed by itself, which C2PA refuses; give one of an issuer"
        )
    try:
        uses = {
            use.dotted_string for use in leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        }
    except x509.ExtensionNotFound:
        uses = set()
    if not uses & PURPOSES:
        raise _bad(
            f"the first certificate in {path} is not made for signing: its extended key usage must have "
            "emailProtection or documentSigning"
        )


def _algorithm(key: Any, path: str | Path) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in CURVES:
        return CURVES[key.curve.name]
    if isinstance(key, rsa.RSAPrivateKey) and key.key_size >= RSA_BITS:
        return "ps256"
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return "ed25519"
    raise _bad(
        f"the key in {path} is of a kind that C2PA does not sign with; use P-256, P-384, P-521, Ed25519, or RSA of at "
        f"least {RSA_BITS} bits"
    )


def _c2pa() -> Any:
    try:
        import c2pa
        import cryptography  # noqa: F401 — comes with it; both are asked for here
    except ImportError:
        raise InputError(EXTRA, argument="sign") from None
    return c2pa


def _read(path: str | Path, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no file can have this name"
        raise _bad(f"the {what} {str(path)!r} cannot be read: {reason}") from None


def _bad(message: str) -> InputError:
    return InputError(message, argument="sign")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
