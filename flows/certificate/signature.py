"""Signing a folder with an elliptic-curve key of one's own, and checking it. The one place that knows model-signing."""

from pathlib import Path

from tasks.errors import ArtifactError, ConfigError


def sign(folder: Path, to: Path, key: Path) -> None:
    """Sign all files of a folder with the private key in a PEM file; the signature lies in the folder.

    Raises:
        ConfigError: that file is no private key.
    """
    from model_signing import hashing, signing

    try:
        config = signing.Config().use_elliptic_key_signer(private_key=key)
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"--key {key}: {_first_line(error)}: {_MAKE}") from None
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[to])).sign(folder, to)


def check(folder: Path, signature: Path, key: Path) -> None:
    """Hold all files of a folder against their signature, with a public key in a PEM file.

    Raises:
        ConfigError: that file is no public key.
        ArtifactError: the signature is of another key, damaged, or of other files.
    """
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key
    from model_signing import hashing, verifying

    try:
        load_pem_public_key(key.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"--key {key}: {_first_line(error)}: name the public key of whoever signed") from None
    config = verifying.Config().use_elliptic_key_verifier(public_key=key)
    config.set_hashing_config(hashing.Config().set_ignored_paths(paths=[signature]))
    try:
        config.verify(folder, signature)
    except (
        InvalidSignature,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
    ) as error:  # what it raises of a signature that is none
        raise ArtifactError(
            f"{signature} does not hold ({_first_line(error)}): do not trust this certificate"
        ) from None


_MAKE = "`openssl ecparam -name prime256v1 -genkey -noout -out key.pem` makes one"


def _first_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
