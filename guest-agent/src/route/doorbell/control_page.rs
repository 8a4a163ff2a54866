//! The control page as a guest uses it: what it is, who this VM is, and one request with its answer.

use std::sync::atomic::{Ordering, fence};

use vmfork_abi::{
    ABI_VERSION, CopyList, ErrorCode, Header, Identity, ListedCopy, MAGIC, MAX_CHILDREN, PAGE, PAGE_BYTES,
    Request, Response, Role, Status,
};

use crate::raw::SharedMemory;
use crate::route::RawReport;
use crate::{ForkError, ForkRequest};

/// A control page whose header was checked.
#[derive(Debug)]
pub(crate) struct ControlPage {
    page: SharedMemory,
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
    pub(crate) fn new(page: SharedMemory) -> Result<Self, HeaderError> {
        let page = Self { page };
        let header = page.header();
        if header.magic != MAGIC {
            return Err(HeaderError::Magic { found: header.magic });
        }
        if header.abi_version != ABI_VERSION {
            return Err(HeaderError::Version { page: header.abi_version, ours: ABI_VERSION });
        }
        if header.page_bytes as usize != PAGE_BYTES {
            return Err(HeaderError::Size { page_bytes: header.page_bytes });
        }
        Ok(page)
    }

    /// How many bytes have to be mapped to see all that it has to say: a list of copies may reach beyond the
    /// page.
    pub(crate) fn needed_bytes(&self) -> usize {
        let Header { copies_offset, copies_bytes, .. } = self.header();
        (copies_offset as usize).saturating_add(copies_bytes as usize).max(PAGE_BYTES)
    }

    /// Who this VM is, and how it came out of its latest fork, unchecked. Where an operator forks the VM
    /// meanwhile, this begins in the one and ends in its copy: the copy starts again.
    pub(crate) fn report(&self) -> RawReport {
        loop {
            let identity = self.identity();
            let is_parent = identity.role == Role::Parent.number();
            let (listed, copies) = is_parent.then(|| self.copies()).flatten().unwrap_or_default();
            if self.identity() == identity {
                return RawReport { identity, listed, copies };
            }
        }
    }

    /// How many copies are listed, and the copies; `None` where there is no list. Where it is, is asked anew
    /// each time: since this page was mapped, this VM may have gone to a VMM that has none, or another.
    fn copies(&self) -> Option<(u32, Vec<ListedCopy>)> {
        let offset = Some(self.header().copies_offset as usize).filter(|&offset| offset != 0)?;
        let list = CopyList::from_bytes(&self.page.read_at(offset)?);
        let count = list.count.min(MAX_CHILDREN) as usize;
        let copy = |number| Some(ListedCopy::from_bytes(&self.page.read_at(offset + CopyList::at(number))?));
        Some((list.count, (0..count).map(copy).collect::<Option<_>>()?))
    }

    fn header(&self) -> Header {
        Header::from_bytes(&self.page.read::<{ PAGE.header.offset }, _>())
    }

    /// Who this VM is, unchecked.
    pub(crate) fn identity(&self) -> Identity {
        Identity::from_bytes(&self.page.read::<{ PAGE.identity.offset }, _>())
    }

    /// Writes the request of the VM `asker`, rings by `ring`, and reads the answer: what the page says of the
    /// VM that this has returned in.
    ///
    /// The request's number is made of `nonce`, random bits, by which the answer to this request is told from
    /// the answer to any other: also of one that was made meanwhile, by a program that does not wait for its
    /// turn.
    ///
    /// # Errors
    ///
    /// [`ForkError::Copied`] in a copy that came of any other request; in the VM `asker`,
    /// [`ForkError::NotAnswered`], [`ForkError::Refused`] or [`ForkError::UnknownAnswer`].
    pub(crate) fn exchange(
        &self,
        request: &ForkRequest,
        asker: [u8; 16],
        nonce: u64,
        ring: impl FnOnce(),
    ) -> Result<RawReport, ForkError> {
        let seq = new_seq(nonce, self.request().seq, self.response().seq);
        self.page.write::<{ PAGE.request.offset }, _>(&request.numbered(seq, asker).to_bytes());
        fence(Ordering::SeqCst);
        ring();
        fence(Ordering::SeqCst);
        accept(seq, self.response()).map_err(|error| match error {
            // Whatever the answer is, this VM is not the one that has asked.
            _ if self.identity().vm_id != asker => ForkError::Copied,
            error => error,
        })?;
        Ok(self.report())
    }

    fn request(&self) -> Request {
        Request::from_bytes(&self.page.read::<{ PAGE.request.offset }, _>())
    }

    fn response(&self) -> Response {
        Response::from_bytes(&self.page.read::<{ PAGE.response.offset }, _>())
    }
}

/// A number made of `nonce` that is neither the last request's nor the last response's, and not zero. It has
/// 52 bits, as many as go through every reader of JSON: events and traces have it too.
fn new_seq(nonce: u64, last_request: u64, last_response: u64) -> u64 {
    let seq = (nonce >> 12).max(1);
    [seq, seq + 1, seq + 2]
        .into_iter()
        .find(|&seq| seq != last_request && seq != last_response)
        .unwrap_or(seq)
}

/// Passes if `response` says that request `seq` was served.
fn accept(seq: u64, response: Response) -> Result<(), ForkError> {
    let Response { status, error, .. } = response;
    if response.seq != seq {
        return Err(ForkError::NotAnswered { seq, last: response.seq });
    }
    match (Status::from_number(status), ErrorCode::from_number(error)) {
        (Some(Status::Forked), Some(ErrorCode::None)) => Ok(()),
        (Some(Status::Failed), Some(ErrorCode::Copied)) => Err(ForkError::Copied),
        (Some(Status::Failed), Some(code)) if code != ErrorCode::None => Err(ForkError::Refused(code)),
        _ => Err(ForkError::UnknownAnswer { status, error }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use vmfork_abi::REGION_BYTES;

    use super::*;
    use crate::outcome::tests::{child, copies};
    use crate::raw::tests::file;

    fn header() -> Header {
        Header { magic: MAGIC, abi_version: ABI_VERSION, page_bytes: 4096, ..Header::default() }
    }

    fn with_header(header: Header) -> Result<ControlPage, HeaderError> {
        mapped(&file(PAGE_BYTES), header, PAGE_BYTES)
    }

    fn mapped(file: &File, header: Header, bytes: usize) -> Result<ControlPage, HeaderError> {
        file.write_all_at(&header.to_bytes(), 0).unwrap();
        ControlPage::new(SharedMemory::map(file, 0, bytes).unwrap())
    }

    /// What a VMM that lists copies leaves in a parent's memory, with a list that says that it has `count`.
    fn parents_memory(count: u32) -> (File, Header) {
        let file = file(REGION_BYTES);
        let (offset, bytes) = (PAGE.copies.offset, PAGE.copies.bytes);
        let header = Header {
            copies_offset: u32::try_from(offset).unwrap(),
            copies_bytes: u32::try_from(bytes).unwrap(),
            ..header()
        };
        let identity = Identity { role: Role::Parent.number(), ..child() };
        file.write_all_at(&identity.to_bytes(), PAGE.identity.offset as u64).unwrap();
        file.write_all_at(&CopyList { seq: 1, count, ..CopyList::default() }.to_bytes(), offset as u64)
            .unwrap();
        for (number, copy) in copies().iter().enumerate() {
            file.write_all_at(&copy.to_bytes(), (offset + CopyList::at(number)) as u64).unwrap();
        }
        (file, header)
    }

    const ASKER: [u8; 16] = [3; 16];

    /// Random bits, and the number of the request for which they are taken.
    const NONCE: u64 = 0x1234_5678_9abc_def0;
    const SEQ: u64 = 0x1_2345_6789_abcd;

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
        let lasts = [0, 1, 2, SEQ, SEQ + 1, u64::MAX >> 12, u64::MAX];
        for nonce in [0, 4095, 4096, NONCE, u64::MAX] {
            for (request, response) in lasts.iter().flat_map(|&a| lasts.map(|b| (a, b))) {
                let seq = new_seq(nonce, request, response);
                assert!(![0, request, response].contains(&seq), "{nonce} {request} {response} {seq}");
                assert!(seq <= 1 << 53, "{seq} goes through JSON");
            }
        }
    }

    #[test]
    fn an_answered_request_yields_the_identity() {
        let control = with_header(header()).unwrap();
        let request = ForkRequest::new("web", 4).unwrap();
        for round in 0..3 {
            let report = control.exchange(&request, ASKER, NONCE + (round << 12), || {
                assert_eq!(control.request(), request.numbered(SEQ + round, ASKER));
                answer(&control, 0, Status::Forked.number(), 0);
            });
            assert_eq!(report.unwrap().identity.role, Role::Child.number());
        }
    }

    /// What a VMM does at the doorbell, for a ring that comes back in the original or in a copy: it forks the
    /// VM as the request says that it finds.
    fn serve(control: &ControlPage, in_copy: bool) {
        let Request { seq, count, .. } = control.request();
        let role = if in_copy { Role::Child } else { Role::Parent };
        let vm_id = if in_copy { child().vm_id } else { ASKER };
        let identity = Identity { role: role.number(), index: u32::from(in_copy), count, vm_id, ..child() };
        let response = Response { seq, status: Status::Forked.number(), ..Response::default() };
        control.page.write::<{ PAGE.response.offset }, _>(&response.to_bytes());
        control.page.write::<{ PAGE.identity.offset }, _>(&identity.to_bytes());
    }

    #[test]
    fn callers_that_do_not_wait_for_each_other_take_no_answer_of_the_others() {
        let [one, other] = [1, 2].map(|count| ForkRequest::new("web", count).unwrap());
        let last = Identity { role: Role::Parent.number(), index: 0, count: 9, vm_id: ASKER, ..child() };
        for in_copy in [false, true] {
            for (others_ring, own_ring) in [(true, true), (true, false), (false, true), (false, false)] {
                let control = with_header(header()).unwrap();
                control.page.write::<{ PAGE.identity.offset }, _>(&last.to_bytes());
                let asked = control.exchange(&one, ASKER, NONCE, || {
                    // The same random bits would be an accident; the same last request is none.
                    let asked = control.exchange(&other, ASKER, !NONCE, || {
                        if others_ring {
                            serve(&control, in_copy);
                        }
                    });
                    match asked {
                        Ok(report) => assert_eq!((others_ring, report.identity.count), (true, 2)),
                        Err(error) => assert!(!others_ring, "{error}"),
                    }
                    if own_ring {
                        serve(&control, in_copy);
                    }
                });
                let error = asked.expect_err("the other's request was served, or none");
                let is_copy = in_copy && (others_ring || own_ring);
                assert_eq!(error.role(), is_copy.then_some(Role::Child), "{error}");
                assert_eq!(matches!(error, ForkError::NotAnswered { seq: SEQ, .. }), !is_copy, "{error}");
            }
        }
    }

    #[test]
    fn a_parent_finds_its_copies_where_the_header_says() {
        let (file, header) = parents_memory(3);
        let page = mapped(&file, header, PAGE_BYTES).unwrap();
        let page = mapped(&file, header, page.needed_bytes()).unwrap();
        let report = page.report();
        assert_eq!((report.listed, report.copies), (3, copies()));
        // As many as there can be are all within what is mapped, and more are not looked for.
        for listed in [MAX_CHILDREN, MAX_CHILDREN + 1, u32::MAX] {
            let list = CopyList { count: listed, ..CopyList::default() };
            file.write_all_at(&list.to_bytes(), PAGE.copies.offset as u64).unwrap();
            let report = page.report();
            assert_eq!((report.listed, report.copies.len()), (listed, MAX_CHILDREN as usize));
        }
    }

    #[test]
    fn nothing_is_listed_in_a_child_or_by_other_vmms() {
        let (file, header) = parents_memory(3);
        let listed = |header: Header, bytes| mapped(&file, header, bytes).unwrap().report().listed;
        assert_eq!(listed(header, REGION_BYTES), 3);
        assert_eq!(listed(Header { copies_offset: 0, copies_bytes: 0, ..header }, PAGE_BYTES), 0);
        for copies_offset in [769, 1 << 20, u32::MAX - 7] {
            assert_eq!(listed(Header { copies_offset, ..header }, REGION_BYTES), 0);
        }
        file.write_all_at(&child().to_bytes(), PAGE.identity.offset as u64).unwrap();
        assert_eq!(listed(header, REGION_BYTES), 0);
    }

    /// What a fork of one child answers where the VMM does this.
    fn asked(control: &ControlPage, ring: impl FnOnce()) -> ForkError {
        control.exchange(&ForkRequest::new("web", 1).unwrap(), child().vm_id, NONCE, ring).unwrap_err()
    }

    #[test]
    fn silence_and_other_requests_answers_are_errors() {
        let control = with_header(header()).unwrap();
        control.page.write::<{ PAGE.identity.offset }, _>(&child().to_bytes());
        let silent = asked(&control, || ());
        assert!(matches!(silent, ForkError::NotAnswered { seq: SEQ, last: 0 }), "{silent}");
        let other = asked(&control, || answer(&control, 7, Status::Forked.number(), 0));
        assert!(
            matches!(other, ForkError::NotAnswered { seq, last } if seq == SEQ + 1 && last == SEQ + 8),
            "{other}"
        );
    }

    #[test]
    fn refusals_keep_their_code() {
        let control = with_header(header()).unwrap();
        for &code in ErrorCode::ALL.iter().filter(|&&code| code != ErrorCode::None) {
            match asked(&control, || answer(&control, 0, Status::Failed.number(), code.number())) {
                ForkError::Copied => assert_eq!(code, ErrorCode::Copied),
                error => assert_eq!(error.code(), Some(code).filter(|&code| code != ErrorCode::Copied)),
            }
        }
    }

    #[test]
    fn answers_that_contradict_themselves_are_errors() {
        let control = with_header(header()).unwrap();
        for (status, error) in [(0, 0), (1, 3), (2, 0), (2, 999), (7, 0)] {
            let answered = asked(&control, || answer(&control, 0, status, error));
            assert!(matches!(answered, ForkError::UnknownAnswer { .. }), "{answered}");
        }
    }
}
