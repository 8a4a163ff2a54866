//! The memory of a clone that comes in.

use std::{ops::Range, sync::Arc};

use capsule::Assembly;

use super::{MAX_RANGES, postcopy::PostcopyMemory};

/// Memory that comes in.
#[derive(Debug, Clone)]
pub(super) enum Memory {
    /// As a whole, before the copies run.
    Whole(Arc<Assembly>),
    /// For a part, and the rest while they run.
    Lazy(Arc<PostcopyMemory>),
}

/// Memory of which as much has come as its copies need to run.
pub(super) enum Complete {
    Whole(Box<Assembly>),
    Lazy(Arc<PostcopyMemory>),
}

impl Memory {
    /// What is to be sent before its copies can run, in not too many ranges.
    pub(super) fn missing(&self) -> Vec<Range<u32>> {
        match self {
            Self::Whole(assembly) => missing(assembly),
            Self::Lazy(_) => Vec::new(),
        }
    }

    /// Takes it, once nobody puts anything into it any more; else says what has come too early.
    pub(super) fn into_complete(self) -> Result<Complete, (Self, &'static str)> {
        let assembly = match self {
            Self::Lazy(postcopy) => return Ok(Complete::Lazy(postcopy)),
            Self::Whole(assembly) => assembly,
        };
        match Arc::try_unwrap(assembly) {
            Ok(assembly) if assembly.missing().is_empty() => Ok(Complete::Whole(Box::new(assembly))),
            Ok(assembly) => {
                Err((Self::Whole(Arc::new(assembly)), "the end of its memory, of which some is missing,"))
            }
            Err(assembly) => {
                Err((Self::Whole(assembly), "the end of its memory, of which some is on its way,"))
            }
        }
    }
}

/// What is missing, in not too many ranges.
fn missing(assembly: &Assembly) -> Vec<Range<u32>> {
    let mut missing = assembly.missing();
    let mut gap = 1;
    while missing.len() > MAX_RANGES {
        let mut joined: Vec<Range<u32>> = Vec::new();
        for range in missing {
            match joined.last_mut() {
                Some(last) if range.start - last.end <= gap => last.end = range.end,
                _ => joined.push(range),
            }
        }
        (missing, gap) = (joined, gap * 2);
    }
    missing
}
