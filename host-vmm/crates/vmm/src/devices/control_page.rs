//! The control page, from the VMM's side. Its layout is in the crate `vmfork-abi`.
//!
//! The guest can write all of the page at any time. So the request is copied out once and only the copy is
//! looked at, and what the VMM wrote is never read back. A list of many copies reaches into the pages behind
//! it, and the last of these holds the generation alone. Behind that comes the page of the VM generation ID,
//! which the guest can only read.
//!
//! Header, identity, generation and list are each VM's own. What guest and VMM have said to each other,
//! request and response, is state: a copy that its guest did not ask for may have been about to ask for
//! something else, or to read an answer, and finds both as they were.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmfork_abi::{
    ABI_VERSION, CopyList, Generation, Header, Identity, ListedCopy, MAGIC, PAGE, PAGE_BYTES, REGION_BYTES,
    Request, Response, Status,
};

use super::{Device, Error, GENERATION_ID_BYTES};
use crate::{
    arch::{
        cpuid::ABI_FEATURES,
        layout::{CONTROL_PAGE, GENERATION_ID},
    },
    memory::{self, Mapping},
};

/// One VM's control page. Cloning it gives the same page.
#[derive(Debug, Clone)]
pub struct ControlPage {
    mapping: Arc<Mapping>,
}

/// Request and response as they stand in the page, one behind the other. All bytes are a state; nobody looks
/// at them but the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ControlPageState([[u8; 32]; STATE_BYTES / 32]);

/// Offset in bytes of the page of the VM generation ID in the mapping.
pub const GENERATION_ID_OFFSET: usize = REGION_BYTES;

/// Size of the mapping in bytes.
const MAPPING_BYTES: usize = GENERATION_ID_OFFSET + PAGE_BYTES;

const _: () = assert!(GENERATION_ID.0 - CONTROL_PAGE.0 == GENERATION_ID_OFFSET as u64);

/// Size of the state in bytes.
const STATE_BYTES: usize = Request::BYTES + Response::BYTES;

const _: () = assert!(PAGE.request.offset + Request::BYTES == PAGE.response.offset);
const _: () = assert!(STATE_BYTES.is_multiple_of(32));

impl ControlPageState {
    /// The state in a copy that the request `seq` has made: it is answered, and nothing is asked for any
    /// more.
    pub fn forked(seq: u64) -> Self {
        let mut state = Self::default();
        let response = Response { seq, status: Status::Forked.number(), ..Default::default() };
        state.0.as_flattened_mut()[Request::BYTES..].copy_from_slice(&response.to_bytes());
        state
    }
}

impl ControlPage {
    /// A page with its header and nothing else.
    ///
    /// # Errors
    /// [`memory::Error`] where there is no memory for it.
    pub fn new() -> Result<Self, memory::Error> {
        let mapping = Arc::new(Mapping::reserve(MAPPING_BYTES)?);
        mapping.map_shared(&memory::unsealed("vm-control-page", MAPPING_BYTES as u64)?)?;
        let page = Self { mapping };
        page.write_header()?;
        // Takes these pages from the host now, and not while a fork waits for them.
        page.write_generation(0)?;
        page.write_generation_id(&[0; GENERATION_ID_BYTES])?;
        Ok(page)
    }

    fn write_header(&self) -> Result<(), memory::Error> {
        let header = Header {
            magic: MAGIC,
            abi_version: ABI_VERSION,
            page_bytes: u32::try_from(PAGE_BYTES).unwrap_or(0),
            copies_offset: u32::try_from(PAGE.copies.offset).unwrap_or(0),
            copies_bytes: u32::try_from(PAGE.copies.bytes).unwrap_or(0),
            generation_offset: u32::try_from(PAGE.generation.offset).unwrap_or(0),
            features: ABI_FEATURES,
            ..Default::default()
        };
        self.mapping.write(PAGE.header.offset, &header.to_bytes())
    }

    /// Does `work` while `code` stands at the start of the page, for a vCPU to run it: nothing else is mapped
    /// before a VM has its memory.
    ///
    /// # Errors
    /// As [`ControlPage::request`].
    pub fn with_code<T>(&self, code: &[u8], work: impl FnOnce() -> T) -> Result<T, memory::Error> {
        self.mapping.write(0, code)?;
        let result = work();
        self.write_header()?;
        Ok(result)
    }

    /// The memory to show to the guest.
    pub fn mapping(&self) -> &Arc<Mapping> {
        &self.mapping
    }

    /// Copies the request out. It is as the guest wrote it: unchecked.
    ///
    /// # Errors
    /// [`memory::Error`] never, for as long as the page's layout is right.
    pub fn request(&self) -> Result<Request, memory::Error> {
        let mut bytes = [0; Request::BYTES];
        self.mapping.read(PAGE.request.offset, &mut bytes)?;
        Ok(Request::from_bytes(&bytes))
    }

    /// Writes the state.
    ///
    /// # Errors
    /// As [`ControlPage::request`].
    pub fn restore(&self, state: &ControlPageState) -> Result<(), memory::Error> {
        self.mapping.write(PAGE.request.offset, state.0.as_flattened())
    }

    /// Writes the response.
    ///
    /// # Errors
    /// As [`ControlPage::request`].
    pub fn respond(&self, response: &Response) -> Result<(), memory::Error> {
        self.mapping.write(PAGE.response.offset, &response.to_bytes())
    }

    /// Writes who this VM is, and its generation where processes look for that.
    ///
    /// # Errors
    /// As [`ControlPage::request`].
    pub fn identify(&self, identity: &Identity) -> Result<(), memory::Error> {
        self.write_generation(identity.generation)?;
        self.mapping.write(PAGE.identity.offset, &identity.to_bytes())
    }

    fn write_generation(&self, generation: u32) -> Result<(), memory::Error> {
        let generation = Generation { generation: generation.into(), ..Default::default() };
        self.mapping.write(PAGE.generation.offset, &generation.to_bytes())
    }

    /// Writes the VM generation ID, which tells a guest that it is in another VM.
    ///
    /// # Errors
    /// As [`ControlPage::request`].
    pub fn write_generation_id(&self, id: &[u8; GENERATION_ID_BYTES]) -> Result<(), memory::Error> {
        self.mapping.write(GENERATION_ID_OFFSET, id)
    }

    /// Writes which copies the request `seq` made.
    ///
    /// # Errors
    /// [`memory::Error`] where they are more than a fork can make.
    pub fn list(&self, seq: u64, copies: &[ListedCopy]) -> Result<(), memory::Error> {
        let count = u32::try_from(copies.len()).unwrap_or(u32::MAX);
        for (number, copy) in copies.iter().enumerate() {
            self.mapping.write(PAGE.copies.offset + CopyList::at(number), &copy.to_bytes())?;
        }
        self.mapping.write(PAGE.copies.offset, &CopyList { seq, count, ..Default::default() }.to_bytes())
    }
}

/// No access to it has an exit, so that it needs no seat: it is saved while all vCPUs stand still.
impl Device for ControlPage {
    const NAME: &'static str = "control-page";
    const VERSION: u32 = ABI_VERSION;
    type State = ControlPageState;

    fn save(&self) -> Result<ControlPageState, Error> {
        let mut state = ControlPageState::default();
        self.mapping.read(PAGE.request.offset, state.0.as_flattened_mut())?;
        Ok(state)
    }
}

#[cfg(test)]
mod tests {
    use vmfork_abi::{MAX_CHILDREN, features};

    use super::*;

    fn header(page: &ControlPage) -> Header {
        let mut header = [0; Header::BYTES];
        page.mapping().read(PAGE.header.offset, &mut header).unwrap();
        Header::from_bytes(&header)
    }

    /// What a process finds that looks where the header says.
    fn generation(page: &ControlPage) -> u64 {
        let offset = header(page).generation_offset as usize;
        assert!(offset.is_multiple_of(PAGE_BYTES) && offset + PAGE_BYTES <= page.mapping().bytes());
        let mut generation = [0; Generation::BYTES];
        page.mapping().read(offset, &mut generation).unwrap();
        Generation::from_bytes(&generation).generation
    }

    #[test]
    fn what_the_header_promises_the_page_has() {
        let page = ControlPage::new().unwrap();
        let shown = header(&page);
        assert_eq!(
            (shown.abi_version, shown.features, shown.padding, shown.reserved),
            (1, ABI_FEATURES, 0, [0; 24])
        );
        assert_eq!(shown.features & features::COPIES != 0, shown.copies_offset != 0);
        assert_eq!(shown.features & features::GENERATION_PAGE != 0, shown.generation_offset != 0);
        // A state says nothing of it: the header is its VMM's own, also where code stood in its place.
        page.with_code(&[0x90; Header::BYTES], || ()).unwrap();
        page.restore(&ControlPageState::forked(7)).unwrap();
        assert_eq!(header(&page), shown);
    }

    #[test]
    fn any_bytes_are_a_request() {
        let page = ControlPage::new().unwrap();
        for filling in [0x00, 0x5a, 0xff] {
            page.mapping().write(0, &[filling; PAGE_BYTES]).unwrap();
            assert_eq!(page.request().unwrap().to_bytes(), [filling; Request::BYTES]);
        }
    }

    #[test]
    fn a_restored_page_is_equal_but_for_who_it_belongs_to() {
        let (page, copy) = (ControlPage::new().unwrap(), ControlPage::new().unwrap());
        page.mapping()
            .write(PAGE.request.offset, &Request { seq: 7, count: 2, ..Default::default() }.to_bytes())
            .unwrap();
        page.respond(&Response { seq: 6, status: 2, error: 3, ..Default::default() }).unwrap();
        page.identify(&Identity { index: 1, generation: 1, ..Default::default() }).unwrap();
        copy.restore(&page.save().unwrap()).unwrap();
        assert_eq!(copy.save().unwrap(), page.save().unwrap());
        assert_eq!(copy.request().unwrap(), Request { seq: 7, count: 2, ..Default::default() });
        let mut identity = [0; Identity::BYTES];
        copy.mapping().read(PAGE.identity.offset, &mut identity).unwrap();
        assert_eq!(identity, [0; Identity::BYTES]);
        assert_eq!((generation(&page), generation(&copy)), (1, 0));
    }

    #[test]
    fn the_generation_is_alone_on_its_page_whatever_a_guest_has_made_of_it() {
        let page = ControlPage::new().unwrap();
        page.mapping().write(PAGE_BYTES, &vec![0xff; REGION_BYTES - PAGE_BYTES]).unwrap();
        for number in [0, 1, u32::MAX] {
            page.identify(&Identity { generation: number, ..Default::default() }).unwrap();
            assert_eq!(generation(&page), u64::from(number));
        }
        let copies = vec![ListedCopy::default(); MAX_CHILDREN as usize];
        page.list(1, &copies).unwrap();
        page.with_code(&[0x90; 64], || ()).unwrap();
        assert_eq!(generation(&page), u64::from(u32::MAX));
    }

    #[test]
    fn a_request_that_made_a_copy_is_answered_there() {
        let page = ControlPage::new().unwrap();
        page.restore(&ControlPageState::forked(7)).unwrap();
        let mut response = [0; Response::BYTES];
        page.mapping().read(PAGE.response.offset, &mut response).unwrap();
        let forked = Response { seq: 7, status: Status::Forked.number(), ..Default::default() };
        assert_eq!(Response::from_bytes(&response), forked);
        assert_eq!(page.request().unwrap(), Request::default());
    }

    #[test]
    fn as_many_copies_as_there_can_be_are_listed_where_the_header_says() {
        let page = ControlPage::new().unwrap();
        let read = |at: usize| {
            let mut bytes = [0; 64];
            page.mapping().read(at, &mut bytes).unwrap();
            bytes
        };
        let header = header(&page);
        let (offset, bytes) = (header.copies_offset as usize, header.copies_bytes as usize);
        assert!(offset + bytes <= page.mapping().bytes());
        let copies: Vec<_> =
            (1..=MAX_CHILDREN).map(|index| ListedCopy { index, ..Default::default() }).collect();
        page.list(7, &copies).unwrap();
        assert_eq!(
            CopyList::from_bytes(&read(offset)),
            CopyList { seq: 7, count: MAX_CHILDREN, ..Default::default() }
        );
        for (number, copy) in copies.iter().enumerate() {
            assert_eq!(ListedCopy::from_bytes(&read(offset + CopyList::at(number))), *copy);
        }
        page.list(8, &[]).unwrap();
        assert_eq!(CopyList::from_bytes(&read(offset)), CopyList { seq: 8, ..Default::default() });
    }
}
