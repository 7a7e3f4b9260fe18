"""Certificates and keys of a federation, and whether they are valid.

One authority signs the server's certificate; clients know the authority and the server's address.
Every client has its own key, whose public half the server knows.
"""

from __future__ import annotations

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from certifl.errors import InputError, WorkError
from certifl.runs.atomic import write_bytes, write_secret
from certifl.safe_io import SPEC_BYTES, read_bytes

_AUTHORITY_DAYS, _SERVER_DAYS = 3650, 825
_LONGEST_KEY = 1 << 14  # bytes of a file with one public key


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


@dataclass(frozen=True)
class Authority:
    """The authority of one federation.

    Attributes:
        key: with it anyone can pose as the server: keep it offline.
        certificate: public.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @staticmethod
    def new(days: int = _AUTHORITY_DAYS) -> Authority:
        """A new authority, allowed to sign certificates only."""
        key = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "certifl federation")])
        cert = _begun(name, name, key.public_key(), days)
        cert = cert.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        cert = cert.add_extension(_usage(signs=True), critical=True)
        public = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        cert = cert.add_extension(public, critical=False)
        return Authority(key, cert.sign(key, hashes.SHA384()))

    @staticmethod
    def load(key: Path, certificate: Path) -> Authority:
        """An authority from its two files; InputError where they cannot be read."""
        try:
            loaded = serialization.load_pem_private_key(read_bytes(key, SPEC_BYTES), None)
            signed = x509.load_pem_x509_certificate(read_bytes(certificate, SPEC_BYTES))
        except (OSError, ValueError) as error:
            raise InputError(f"{key} and {certificate} are not an authority: {error}.") from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise InputError(f"{key} is not an elliptic-curve key.")
        return Authority(loaded, signed)

    def save(self, key: Path, certificate: Path) -> None:
        """Write both files."""
        write_secret(key, _pem(self.key))
        write_bytes(certificate, self.certificate.public_bytes(serialization.Encoding.PEM))

    def server(
        self, hosts: list[str], key: Path, certificate: Path, days: int = _SERVER_DAYS
    ) -> None:
        """Write a server's key, and its certificate for these names and addresses."""
        own = ec.generate_private_key(ec.SECP384R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "certifl server")])
        cert = _begun(name, self.certificate.subject, own.public_key(), days)
        names = x509.SubjectAlternativeName([_general(host) for host in hosts])
        for extension, critical in (
            (names, False),
            (x509.BasicConstraints(ca=False, path_length=None), True),
            (_usage(signs=False), True),
            (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
            (x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False),
            (x509.SubjectKeyIdentifier.from_public_key(own.public_key()), False),
        ):
            cert = cert.add_extension(extension, critical)
        signed = cert.sign(self.key, hashes.SHA384())
        write_secret(key, _pem(own))
        write_bytes(certificate, signed.public_bytes(serialization.Encoding.PEM))


def _begun(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    # Valid since yesterday, for clocks that differ. Negative `days`: expired.
    begins = now - timedelta(days=1 + max(0, -days))
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begins)
        .not_valid_after(now + timedelta(days=days))
    )


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def node_key(private: Path, public: Path) -> None:
    """Write a client's key pair as ssh-keygen -t ecdsa -b 384 does."""
    key = ec.generate_private_key(ec.SECP384R1())
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    write_secret(private, content)
    public_key = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    write_bytes(public, public_key + b"\n")


def public_key_bytes(path: Path) -> bytes:
    """A client's public key as the server compares it; InputError where it is not one."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    try:
        key = serialization.load_ssh_public_key(read_bytes(path, _LONGEST_KEY))
    except (OSError, UnsupportedAlgorithm, ValueError) as error:
        raise InputError(f"{path} is not a public key: {error}.") from error
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise InputError(f"{path} is not an elliptic-curve key: make one with ecdsa, 384 bits.")
    return public_key_to_bytes(key)


def check_certificate(path: Path) -> None:
    """Refuse a certificate that is not valid today (WorkError), or unreadable (InputError)."""
    try:
        certificate = x509.load_pem_x509_certificate(read_bytes(path, SPEC_BYTES))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a certificate: {error}.") from error
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise WorkError(
            f"{path} expired on {certificate.not_valid_after_utc:%Y-%m-%d}. Make a new one with "
            "`certifl deploy renew`, where the authority's key is, and replace this file."
        )
    if now < certificate.not_valid_before_utc:
        raise WorkError(f"{path} is not valid yet: check this machine's clock.")


def connection_problem(
    host: str, port: int, authority: Path | None, seconds: float = 5.0
) -> str | None:
    """Why the server cannot be reached yet, or None; WorkError if it is not authentic."""
    try:
        with socket.create_connection((host, port), timeout=seconds) as line:
            if authority is None:
                return None
            context = ssl.create_default_context(cafile=str(authority))
            with context.wrap_socket(line, server_hostname=host):
                return None
    except ssl.SSLCertVerificationError as error:
        raise WorkError(_untrusted(host, port, error)) from error
    except ssl.SSLError as error:
        raise WorkError(
            f"{host}:{port} does not speak TLS ({error.reason}). Is it the federation's server, "
            "and was it started without --insecure?"
        ) from error
    except OSError as error:
        return f"{host}:{port} does not answer ({error})"


def _untrusted(host: str, port: int, error: ssl.SSLCertVerificationError) -> str:
    if error.verify_code == 10:
        return (
            f"The certificate of {host}:{port} has expired. Ask the server's operator for a new "
            "one (`certifl deploy renew`); nothing was sent."
        )
    if error.verify_code in (62, 64):
        return (
            f"The certificate of {host}:{port} is for another name. The server's address must be "
            "one that was named in `certifl deploy init --server`; nothing was sent."
        )
    return (
        f"{host}:{port} is not the server of this federation ({error.verify_message}): its "
        "certificate is not signed by the authority in ca.crt. Nothing was sent."
    )
