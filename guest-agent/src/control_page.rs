//! The control page as a guest uses it: what it is, who this VM is, and one request with its answer.

use std::sync::atomic::{Ordering, fence};

use vmfork_abi::{ABI_VERSION, ErrorCode, Header, Identity, MAGIC, PAGE, PAGE_BYTES, Request, Response, Status};

use crate::raw::SharedPage;
use crate::{ForkError, ForkRequest};

/// A control page whose header was checked.
#[derive(Debug)]
pub(crate) struct ControlPage {
    page: SharedPage,
}

/// What shows that a page is no control page of this ABI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// The page is something else.
    #[error("the page starts with {found:#018x}, and a control page with {MAGIC:#018x}")]
    Magic {
        /// What it starts with.
        found: u64,
    },
    /// The page was laid out by another version of the ABI.
    #[error("the control page has ABI version {page}, and this program version {ours}")]
    Version {
        /// The page's version.
        page: u32,
        /// This crate's version.
        ours: u32,
    },
    /// The page has another size.
    #[error("the control page has {page_bytes} bytes, and not {PAGE_BYTES}")]
    Size {
        /// The size it claims, in bytes.
        page_bytes: u32,
    },
}

impl ControlPage {
    /// Takes `page` for a control page.
    ///
    /// # Errors
    ///
    /// [`HeaderError`] where its header says that it is none of this ABI.
    pub(crate) fn new(page: SharedPage) -> Result<Self, HeaderError> {
        let header = Header::from_bytes(&page.read::<{ PAGE.header.offset }, _>());
        if header.magic != MAGIC {
            return Err(HeaderError::Magic { found: header.magic });
        }
        if header.abi_version != ABI_VERSION {
            return Err(HeaderError::Version { page: header.abi_version, ours: ABI_VERSION });
        }
        if header.page_bytes as usize != PAGE_BYTES {
            return Err(HeaderError::Size { page_bytes: header.page_bytes });
        }
        Ok(Self { page })
    }

    /// Who this VM is, unchecked.
    pub(crate) fn identity(&self) -> Identity {
        Identity::from_bytes(&self.page.read::<{ PAGE.identity.offset }, _>())
    }

    /// Writes the request, rings by `ring`, and reads the answer: the identity of the VM that this has returned in.
    ///
    /// # Errors
    ///
    /// [`ForkError::NotAnswered`], [`ForkError::Refused`] or [`ForkError::UnknownAnswer`].
    pub(crate) fn exchange(&self, request: &ForkRequest, ring: impl FnOnce()) -> Result<Identity, ForkError> {
        let seq = next_seq(self.request().seq, self.response().seq);
        self.page.write::<{ PAGE.request.offset }, _>(&request.numbered(seq).to_bytes());
        fence(Ordering::SeqCst);
        ring();
        fence(Ordering::SeqCst);
        accept(seq, self.response())?;
        Ok(self.identity())
    }

    fn request(&self) -> Request {
        Request::from_bytes(&self.page.read::<{ PAGE.request.offset }, _>())
    }

    fn response(&self) -> Response {
        Response::from_bytes(&self.page.read::<{ PAGE.response.offset }, _>())
    }
}

/// A number that differs from the last request's and the last response's.
fn next_seq(last_request: u64, last_response: u64) -> u64 {
    let next = last_request.wrapping_add(1);
    if next == last_response { next.wrapping_add(1) } else { next }
}

/// Passes if `response` says that request `seq` was served.
fn accept(seq: u64, response: Response) -> Result<(), ForkError> {
    let Response { status, error, .. } = response;
    if response.seq != seq {
        return Err(ForkError::NotAnswered { seq, last: response.seq });
    }
    match (Status::from_number(status), ErrorCode::from_number(error)) {
        (Some(Status::Forked), Some(ErrorCode::None)) => Ok(()),
        (Some(Status::Failed), Some(code)) if code != ErrorCode::None => Err(ForkError::Refused(code)),
        _ => Err(ForkError::UnknownAnswer { status, error }),
    }
}

#[cfg(test)]
mod tests {
    use vmfork_abi::Role;

    use super::*;
    use crate::outcome::tests::child;
    use crate::raw::tests::page;

    fn header() -> Header {
        Header { magic: MAGIC, abi_version: ABI_VERSION, page_bytes: 4096, ..Header::default() }
    }

    fn with_header(header: Header) -> Result<ControlPage, HeaderError> {
        let page = page();
        page.write::<{ PAGE.header.offset }, _>(&header.to_bytes());
        ControlPage::new(page)
    }

    /// What a VMM does at the doorbell: answers the request that it finds, `shift` beside its number.
    fn answer(control: &ControlPage, shift: u64, status: u32, error: u32) {
        let response = Response { seq: control.request().seq + shift, status, error, ..Response::default() };
        control.page.write::<{ PAGE.response.offset }, _>(&response.to_bytes());
        control.page.write::<{ PAGE.identity.offset }, _>(&child().to_bytes());
    }

    #[test]
    fn a_page_that_is_no_control_page_is_refused() {
        assert!(with_header(header()).is_ok());
        assert_eq!(with_header(Header::default()).unwrap_err(), HeaderError::Magic { found: 0 });
        let newer = Header { abi_version: 2, ..header() };
        assert_eq!(with_header(newer).unwrap_err(), HeaderError::Version { page: 2, ours: 1 });
        let larger = Header { page_bytes: 8192, ..header() };
        assert_eq!(with_header(larger).unwrap_err(), HeaderError::Size { page_bytes: 8192 });
    }

    #[test]
    fn a_number_is_never_the_last_one_of_either_side() {
        let numbers = [0, 1, 2, u64::MAX - 1, u64::MAX];
        for (request, response) in numbers.iter().flat_map(|&a| numbers.map(|b| (a, b))) {
            let seq = next_seq(request, response);
            assert!(seq != request && seq != response, "{request} {response} {seq}");
        }
    }

    #[test]
    fn an_answered_request_yields_the_identity() {
        let control = with_header(header()).unwrap();
        let request = ForkRequest::new("web", 4).unwrap();
        for seq in 1..=3 {
            let identity = control.exchange(&request, || {
                assert_eq!(control.request(), request.numbered(seq));
                answer(&control, 0, Status::Forked.number(), 0);
            });
            assert_eq!(identity.unwrap().role, Role::Child.number());
        }
    }

    #[test]
    fn silence_and_other_requests_answers_are_errors() {
        let control = with_header(header()).unwrap();
        let request = ForkRequest::new("web", 1).unwrap();
        let silent = control.exchange(&request, || ()).unwrap_err();
        assert!(matches!(silent, ForkError::NotAnswered { seq: 1, last: 0 }), "{silent}");
        let other = control.exchange(&request, || answer(&control, 7, Status::Forked.number(), 0)).unwrap_err();
        assert!(matches!(other, ForkError::NotAnswered { seq: 2, last: 9 }), "{other}");
    }

    #[test]
    fn refusals_keep_their_code() {
        let control = with_header(header()).unwrap();
        let request = ForkRequest::new("web", 1).unwrap();
        for &code in ErrorCode::ALL.iter().filter(|&&code| code != ErrorCode::None) {
            let error = control.exchange(&request, || answer(&control, 0, Status::Failed.number(), code.number()));
            assert!(matches!(error, Err(ForkError::Refused(refused)) if refused == code));
        }
    }

    #[test]
    fn answers_that_contradict_themselves_are_errors() {
        let control = with_header(header()).unwrap();
        let request = ForkRequest::new("web", 1).unwrap();
        for (status, error) in [(0, 0), (1, 3), (2, 0), (2, 999), (7, 0)] {
            let answered = control.exchange(&request, || answer(&control, 0, status, error)).unwrap_err();
            assert!(matches!(answered, ForkError::UnknownAnswer { .. }), "{answered}");
        }
    }
}
