//! The message codec: encodes and decodes TLV frames (since v04).
//!
//! TCP delivers a stream of bytes, not messages: one read may bring two messages, or only part of
//! one. So each message has a header with its length.
//!
//! ```text
//! 0         4         8                  8 + length
//! +---------+---------+------------------+
//! |   id    | length  |     payload      |      id, length: i32, little-endian
//! +---------+---------+------------------+
//! ```
//!
//! The C++ course has the same frame, so a client of one course works with a server of the other.

use std::fmt;

use byteorder::{ByteOrder, LittleEndian};

/// The size of a header, in bytes (since v04).
pub const HEADER_LEN: usize = 8;

/// The longest payload, in bytes (since v04): its frame of 65,535 bytes fits a block of 64 KiB.
pub const MAX_PAYLOAD: usize = 65_535 - HEADER_LEN;

/// One message; its payload is borrowed from the input, not copied (since v04).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message<'a> {
    /// The kind of message: any value, whose meaning is up to client and server.
    pub id: i32,
    /// 0 to [`MAX_PAYLOAD`] bytes.
    pub payload: &'a [u8],
}

impl Message<'_> {
    /// The size of the whole frame, in bytes.
    pub fn frame_len(&self) -> usize {
        HEADER_LEN + self.payload.len()
    }
}

/// Always one line: `id=1 len=5 hello`. Backslashes, and bytes that are not printable, are escaped.
impl fmt::Display for Message<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "id={} len={}", self.id, self.payload.len())?;
        if !self.payload.is_empty() {
            f.write_str(" ")?;
        }
        for chunk in self.payload.utf8_chunks() {
            // `escape_debug` would escape quotes too.
            for part in chunk.valid().split_inclusive(['"', '\'']) {
                let text = part.trim_end_matches(['"', '\'']);
                write!(f, "{}{}", text.escape_debug(), &part[text.len()..])?;
            }
            for byte in chunk.invalid() {
                write!(f, "\\x{byte:02x}")?;
            }
        }
        Ok(())
    }
}

/// The message at the start of `bytes`, or `None` if it is not complete yet (since v04).
///
/// # Errors
/// [`BadLength`], as soon as the header is complete. The start of the next frame is then unknown.
pub fn decode(bytes: &[u8]) -> Result<Option<Message<'_>>, BadLength> {
    let Some((header, rest)) = bytes.split_at_checked(HEADER_LEN) else { return Ok(None) };
    let id = LittleEndian::read_i32(&header[..4]);
    let length = LittleEndian::read_i32(&header[4..]);
    let length = match usize::try_from(length) {
        Ok(length) if length <= MAX_PAYLOAD => length,
        _ => return Err(BadLength(length.into())),
    };
    Ok(rest.get(..length).map(|payload| Message { id, payload }))
}

/// Parses an option's text that is to be a payload (since v07).
///
/// # Errors
/// One line that says how long it may be.
pub fn parse_payload(text: &str) -> Result<String, String> {
    encode_header(0, text.len()).map(|_| text.to_owned()).map_err(|err| err.to_string())
}

/// Returns the header of a message with `length` bytes of payload (since v04).
///
/// # Errors
/// [`BadLength`] above [`MAX_PAYLOAD`].
pub fn encode_header(id: i32, length: usize) -> Result<[u8; HEADER_LEN], BadLength> {
    let length = match i32::try_from(length) {
        Ok(value) if length <= MAX_PAYLOAD => value,
        _ => return Err(BadLength(length.try_into().unwrap_or(i64::MAX))),
    };
    let mut header = [0; HEADER_LEN];
    LittleEndian::write_i32(&mut header[..4], id);
    LittleEndian::write_i32(&mut header[4..], length);
    Ok(header)
}

/// A length below 0 or above [`MAX_PAYLOAD`] (since v04).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadLength(pub i64);

impl fmt::Display for BadLength {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "message length {} is not within 0 to {MAX_PAYLOAD}", self.0)
    }
}

impl std::error::Error for BadLength {}
