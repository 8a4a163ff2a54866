//! Values to bytes and back: the only user of `bincode`.

use bincode::config::{Configuration, Fixint, Limit, LittleEndian};
use serde::{Serialize, de::DeserializeOwned};

/// Most bytes that a value may claim to have, so that a forged length allocates nothing.
const MAX_BYTES: usize = 64 << 20;

const CONFIG: Configuration<LittleEndian, Fixint, Limit<MAX_BYTES>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<MAX_BYTES>();

/// Why a value could not be coded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The value can't be expressed.
    #[error("encoding failed")]
    Encode(#[source] bincode::error::EncodeError),
    /// The bytes are no such value.
    #[error("decoding failed")]
    Decode(#[source] bincode::error::DecodeError),
    /// There are bytes behind the value.
    #[error("{0} bytes are left over behind the value")]
    Trailing(usize),
}

/// The value as bytes.
///
/// # Errors
/// [`Error::Encode`].
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, Error> {
    bincode::serde::encode_to_vec(value, CONFIG).map_err(Error::Encode)
}

/// The value that these bytes are, all of them.
///
/// # Errors
/// [`Error::Decode`] or [`Error::Trailing`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Error> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, CONFIG).map_err(Error::Decode)?;
    match bytes.len() - used {
        0 => Ok(value),
        left => Err(Error::Trailing(left)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use base::text::Text;

    #[test]
    fn a_value_survives() {
        let value = (7u8, String::from("x"), vec![1u64, 2, 3]);
        assert_eq!(decode::<(u8, String, Vec<u64>)>(&encode(&value).unwrap()).unwrap(), value);
    }

    #[test]
    fn whoever_decodes_a_text_cuts_it() {
        let bytes = encode(&"a\n long text".to_owned()).unwrap();
        assert_eq!(decode::<Text<8>>(&bytes).unwrap(), Text::from("a\n long text"));
        assert!(decode::<Text<8>>(&bytes).unwrap().as_str().len() <= 8);
    }

    #[test]
    fn forged_bytes_are_errors() {
        let bytes = encode(&vec![1u64, 2, 3]).unwrap();
        assert!(matches!(decode::<Vec<u64>>(&bytes[..bytes.len() - 1]), Err(Error::Decode(_))));
        assert!(matches!(decode::<Vec<u64>>(&[bytes, vec![0]].concat()), Err(Error::Trailing(1))));
        assert!(decode::<Vec<u64>>(&u64::MAX.to_le_bytes()).is_err());
    }
}
