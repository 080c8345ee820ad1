"""Files that say how long they are, whole and cut off; any bytes are one or the other, soon."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from media_files import AV, SNDFILE, sound_file, tones, video_file

from g3n_mlx.media.containers import check_whole, ogg_links, with_length

STARTS = [b"RIFF", b"RIFF\0\0\0\0WAVE", b"FORM", b"OggS", b"\x1a\x45\xdf\xa3", b"\0\0\0\x10ftyp", b"ID3", b"\xff\xfb"]
# Their decoders notice, as tests/media/test_audio.py has it.
DECODED = ("flac", "aac", "mp3")
DECLARED = [name for name in (*SNDFILE, *AV) if name not in DECODED]


@pytest.mark.parametrize("name", DECLARED)
def test_sounds(name):
    data = sound_file(name, 2.0)
    check_whole(data)
    for missing in (len(data) // 20, len(data) // 2):
        with pytest.raises(ValueError, match=r"the file is cut off: at least [\d,]+ bytes are missing of [\d,]+"):
            check_whole(data[:-missing])


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "avi"])
def test_videos(container):
    data = video_file(2.0, container, sound=tones(48_000, 2.0))
    check_whole(data)
    with pytest.raises(ValueError, match="the file is cut off"):
        check_whole(data[: len(data) * 3 // 4])


def test_what_follows_the_samples_of_a_wav_is_no_part_of_it():
    data = sound_file("wav")
    check_whole(data + b"LIST\x04\0\0\0abcd")
    check_whole(data + b"LIST\xff\0\0\0abcd")


@settings(deadline=None)
@given(st.sampled_from(STARTS), st.binary(max_size=200))
@example(b"RIFF\0\0\0\0WAVE", b"junk\0\0\0\0" * 200_000)
@example(b"\0\0\0\x08ftyp", b"\0\0\0\x08free" * 200_000)
def test_any_bytes(start, rest):
    assert b"".join(ogg_links(start + rest)) == start + rest
    assert len(with_length(start + rest)) == len(start + rest)
    try:
        check_whole(start + rest)
    except ValueError as error:
        assert str(error).startswith("the file is cut off")  # noqa: PT017 - either way is right
