// The microphone. Browsers record in formats of their own, so what was recorded is sent as 16 kHz WAV, which all can read.

const RATE = 16000;
let recorder = null;

async function record() {
  if (!navigator.mediaDevices || !window.MediaRecorder) {
    notice("Browsers lend the microphone to pages on https and on localhost alone.");
    return;
  }
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    notice(error.name === "NotAllowedError" ? "The browser did not allow the microphone." : `No microphone: ${error.message}`);
    return;
  }
  notice("");
  const pieces = [], began = Date.now();
  recorder = new MediaRecorder(stream);
  const clock = setInterval(() => {
    const seconds = Math.floor((Date.now() - began) / 1000);
    $("clock").textContent = `${Math.floor(seconds / 60)}:${String(seconds % 60).padStart(2, "0")}`;
  }, 250);
  recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
  recorder.addEventListener("stop", async () => {
    clearInterval(clock);
    stream.getTracks().forEach((track) => track.stop());
    const { kept: wanted, mimeType } = recorder;
    recorder = null;
    $("recording").hidden = true;
    $("row").hidden = false;
    $("clock").textContent = "0:00";
    if (wanted) {
      const blob = new Blob(pieces, { type: mimeType });
      const wav = await toWav(blob).catch(() => null);
      choose([new File([wav || blob], wav ? "Recording.wav" : "Recording", { type: wav ? "audio/wav" : blob.type || "audio/webm" })]);
    }
    $("text").focus();
  });
  recorder.start();
  $("row").hidden = true;
  $("recording").hidden = false;
  $("keep").focus();
}

function finishRecording(keep) {
  if (recorder?.state === "recording") {
    recorder.kept = keep;
    recorder.stop();
  }
}

async function toWav(blob) {
  const sound = await new OfflineAudioContext(1, 1, RATE).decodeAudioData(await blob.arrayBuffer());
  const channels = Array.from({ length: sound.numberOfChannels }, (_, i) => sound.getChannelData(i));
  const view = new DataView(new ArrayBuffer(44 + 2 * sound.length));
  const word = (at, text) => [...text].forEach((letter, i) => view.setUint8(at + i, letter.charCodeAt(0)));
  word(0, "RIFF");
  view.setUint32(4, 36 + 2 * sound.length, true);
  word(8, "WAVEfmt ");
  view.setUint32(16, 16, true);
  view.setUint16(20, 1, true); // PCM
  view.setUint16(22, 1, true); // mono
  view.setUint32(24, sound.sampleRate, true);
  view.setUint32(28, 2 * sound.sampleRate, true);
  view.setUint16(32, 2, true);
  view.setUint16(34, 16, true);
  word(36, "data");
  view.setUint32(40, 2 * sound.length, true);
  for (let i = 0; i < sound.length; i++) {
    const value = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
    view.setInt16(44 + 2 * i, Math.round(Math.max(-1, Math.min(1, value)) * 32767), true);
  }
  return new Blob([view], { type: "audio/wav" });
}

$("record").addEventListener("click", record);
$("keep").addEventListener("click", () => finishRecording(true));
$("discard").addEventListener("click", () => finishRecording(false));
