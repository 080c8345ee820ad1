"""`python -m g3n_mlx.media.pdf_reader PAGES SECONDS`: a PDF on stdin to its text on stdout; see document.py."""

import io
import logging
import sys

MAX_BYTES = 1 << 30  # of memory, on Linux


def main() -> int:
    """Reads stdin; returns 1 with a line on stderr when it can't be read."""
    max_pages, max_seconds = int(sys.argv[1]), int(sys.argv[2])
    if sys.platform != "win32":
        import resource

        if sys.platform == "linux":  # macOS reserves more address space than that for any process
            resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (max_seconds, max_seconds))
    from pypdf import PdfReader
    from pypdf.errors import DependencyError, FileNotDecryptedError, PyPdfError

    logging.disable(logging.CRITICAL)  # pypdf's remarks about damage that it can mend
    try:
        reader = PdfReader(io.BytesIO(sys.stdin.buffer.read()))
        if len(reader.pages) > max_pages:
            return _refused(f"it has {len(reader.pages)} pages, expected at most {max_pages}")
        pages = [page.extract_text() for page in reader.pages]
    except FileNotDecryptedError:
        return _refused("it is encrypted; save it without a password")
    except DependencyError:  # of AES
        return _refused("it is encrypted; save it without encryption, or install the package cryptography")
    except PyPdfError as error:
        return _refused(str(error))
    text = "\n\n".join(page.strip() for page in pages)
    sys.stdout.buffer.write(text.encode("utf-8", "replace"))
    return 0


def _refused(reason: str) -> int:
    sys.stderr.write(f"{reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
