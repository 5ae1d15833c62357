// SPDX-License-Identifier: GPL-2.0-only

//! Questions of the host's and answers of a plugin's, each a line of JSON. A connection is one of each.

use serde::de::DeserializeOwned;
use serde::Serialize;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

/// How long the plugin may take to answer.
const ANSWER: Duration = Duration::from_secs(30);

/// Asks who listens on `socket`.
pub(crate) fn ask<A: DeserializeOwned>(socket: &Path, question: &impl Serialize) -> io::Result<A> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER))?;
    send(&mut stream, question)?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Answers who connects, one after the other, for as long as the socket is there. To what is no question `answer` is
/// given what is wrong with it.
pub(crate) fn serve<Q: DeserializeOwned, A: Serialize>(
    listener: &UnixListener,
    answer: impl Fn(Result<Q, String>) -> A,
) {
    while let Ok((stream, _)) = listener.accept() {
        // Who does not wait for the answer has none.
        converse(stream, &answer).ok();
    }
}

fn converse<Q: DeserializeOwned, A: Serialize>(
    mut stream: UnixStream,
    answer: impl Fn(Result<Q, String>) -> A,
) -> io::Result<()> {
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    let question =
        serde_json::from_str(&line).map_err(|error| format!("{line:?} is no question: {error}"));
    send(&mut stream, &answer(question))
}

pub(crate) fn send(stream: &mut UnixStream, what: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(what)?;
    line.push(b'\n');
    stream.write_all(&line)
}
