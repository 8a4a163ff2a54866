//! What a capsule says beside its memory's content: parts, each with a version of its own.
//!
//! A part's version rises with its layout, whatever the others do. A reader knows the version that it writes
//! and the one before. A part that it does not know at all is an error, unless its kind says that it may be
//! passed over.

use std::sync::Arc;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use types::{PAGE_BYTES, VmIdentity, VmShape};
use uuid::Uuid;
use vmm::{
    devices::{ControlPageState, DevicesState, OlderDevicesState},
    kvm::{OlderVcpuState, VcpuState, VmState},
    machine::MachineState,
    memory::Grant,
};

use super::{
    Error, codec,
    compat::{self, Requirements},
    manifest::Manifest,
};

/// Kinds from here on say something that nobody needs to know.
const OPTIONAL: u32 = 1 << 31;

/// Longest name of a VM in bytes.
const MAX_NAME_BYTES: usize = 128;

/// Most parts of a description.
const MAX_PARTS: usize = 64;

/// Metadata of an image: the VM that it was captured of, and when.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageMetadata {
    /// Its ID.
    pub id: Uuid,
    /// When it was made: nanoseconds since 1970 (UTC).
    pub created_ns: u64,
    /// Type of its copies.
    pub vm_type: String,
    /// The VM that it was made of.
    pub original: VmIdentity,
    /// Shape of its copies.
    pub config: VmShape,
    /// Number of the guest's request that it was made for; 0 where an operator has asked.
    pub seq: u64,
}

/// All that a capsule says.
#[derive(Debug, Clone)]
pub struct Description {
    /// Metadata of the image.
    pub metadata: ImageMetadata,
    /// What a platform must have to run its copies.
    pub requirements: Requirements,
    /// The machine's state.
    pub machine: MachineState,
    /// The memory.
    pub memory: Manifest,
    /// Where the memory is compressed: size of each chunk in bytes, as it is stored.
    pub stored: Option<Vec<u32>>,
    /// Memory that it takes, where it has come from elsewhere: given back with the last copy of it.
    pub(crate) _grant: Option<Arc<Grant>>,
}

/// One part as it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct Section {
    kind: u32,
    version: u32,
    body: Vec<u8>,
}

impl ImageMetadata {
    /// Checks the names: they are shown, and copies are called after them.
    ///
    /// # Errors
    /// [`Error::Invalid`].
    pub(super) fn check(&self) -> Result<(), Error> {
        let VmIdentity { name, vm_type, .. } = &self.original;
        let is_name =
            |name: &String| name.len() <= MAX_NAME_BYTES && name.bytes().all(|byte| byte.is_ascii_graphic());
        if vmfork_abi::is_vm_type(&self.vm_type) && [name, vm_type].into_iter().all(is_name) {
            return Ok(());
        }
        Err(Error::Invalid("its VM type is none, or the VM that it is of has an impossible name"))
    }
}

/// Something that is a part of a description.
trait Part: Serialize + DeserializeOwned {
    /// Number by which it is found.
    const KIND: u32;
    /// What it is called in errors.
    const NAME: &'static str;
    /// Version of its layout. Whoever raises it says in [`Part::from_older`] how to read the one before.
    const VERSION: u32;
    /// Oldest version that is read.
    const OLDEST: u32 = Self::VERSION;

    /// Reads a version before [`Part::VERSION`], from [`Part::OLDEST`] on.
    fn from_older(_version: u32, body: &[u8]) -> Result<Self, codec::Error> {
        codec::decode(body)
    }

    /// Checks, before it is read, that it does not become much larger than it is here.
    fn check_body(_body: &[u8]) -> Result<(), Error> {
        Ok(())
    }
}

macro_rules! parts {
    ($($part:ty: $kind:literal, $name:literal, $version:literal $(, before: $older:ty)?;)+) => {
        $(impl Part for $part {
            const KIND: u32 = $kind;
            const NAME: &'static str = $name;
            const VERSION: u32 = $version;
            $(
                const OLDEST: u32 = $version - 1;

                fn from_older(_version: u32, body: &[u8]) -> Result<Self, codec::Error> {
                    codec::decode::<$older>(body).map(Into::into)
                }
            )?
        })+
        const KINDS: &[u32] = &[Vec::<VcpuState>::KIND, $($kind),+];
    };
}

parts! {
    ImageMetadata: 1, "what the image is of", 1;
    Requirements: 2, "what a platform must have", 1;
    Machine: 3, "the machine", 1;
    VmState: 4, "the interrupt controllers and the clock", 1;
    DevicesState: 6, "the devices", 2, before: OlderDevicesState;
    Manifest: 7, "the memory", 1;
    Vec<u32>: 8, "the sizes of compressed chunks", 1;
    ControlPageState: 9, "what guest and VMM have said to each other", 1;
}

impl Part for Vec<VcpuState> {
    const KIND: u32 = 5;
    const NAME: &'static str = "the vCPUs";
    const VERSION: u32 = 2;
    const OLDEST: u32 = 1;

    fn from_older(_version: u32, body: &[u8]) -> Result<Self, codec::Error> {
        Ok(OlderVcpuState::into_current(codec::decode(body)?))
    }

    /// Registers that are left out are read as zero, and take memory like others.
    fn check_body(body: &[u8]) -> Result<(), Error> {
        let count = body.first_chunk().map_or(0, |count| u64::from_le_bytes(*count));
        let least = count.saturating_mul(size_of::<VcpuState>() as u64 / 2);
        if body.len() as u64 >= least {
            Ok(())
        } else {
            Err(Error::Invalid("registers of its vCPUs are missing"))
        }
    }
}

/// What a machine's state has of no other part.
#[derive(Debug, Serialize, Deserialize)]
struct Machine {
    tsc_khz: Option<u32>,
    capabilities: Vec<String>,
}

impl Section {
    fn of<T: Part>(part: &T) -> Result<Self, Error> {
        Ok(Self { kind: T::KIND, version: T::VERSION, body: codec::encode(part)? })
    }
}

/// The parts of a description that were not taken yet.
struct Parts(Vec<Section>);

impl Parts {
    fn take<T: Part>(&mut self) -> Result<Option<T>, Error> {
        let Some(at) = self.0.iter().position(|section| section.kind == T::KIND) else { return Ok(None) };
        let Section { version, body, .. } = self.0.swap_remove(at);
        T::check_body(&body)?;
        if version == T::VERSION {
            Ok(Some(codec::decode(&body)?))
        } else if (T::OLDEST..T::VERSION).contains(&version) {
            Ok(Some(T::from_older(version, &body)?))
        } else {
            Err(Error::Version { what: T::NAME, found: version, oldest: T::OLDEST, newest: T::VERSION })
        }
    }

    fn need<T: Part>(&mut self) -> Result<T, Error> {
        self.take()?.ok_or(Error::MissingPart(T::NAME))
    }
}

impl Description {
    /// As it is stored.
    ///
    /// # Errors
    /// [`Error::Codec`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, Error> {
        let MachineState { vm, vcpus, devices, control_page, tsc_khz, capabilities, config: _ } =
            &self.machine;
        let mut sections = vec![
            Section::of(&self.metadata)?,
            Section::of(&self.requirements)?,
            Section::of(&Machine { tsc_khz: *tsc_khz, capabilities: capabilities.clone() })?,
            Section::of(vm)?,
            Section::of(vcpus)?,
            Section::of(devices)?,
            Section::of(&self.memory)?,
        ];
        if let Some(stored) = &self.stored {
            sections.push(Section::of(stored)?);
        }
        // Most guests have asked for the copies, and been answered. An older program knows that, and nothing
        // else.
        if *control_page != ControlPageState::forked(self.metadata.seq) {
            sections.push(Section::of(control_page)?);
        }
        Ok(codec::encode(&sections)?)
    }

    /// What these bytes say. They may come from anybody: all that is bounded is checked here, but for what
    /// only a machine can tell.
    ///
    /// # Errors
    /// [`Error`]: what is missing, of another version, or can't be.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let sections: Vec<Section> = codec::decode(bytes)?;
        if sections.len() > MAX_PARTS {
            return Err(Error::Invalid("it has too many parts"));
        }
        if let Some(unknown) =
            sections.iter().find(|part| part.kind < OPTIONAL && !KINDS.contains(&part.kind))
        {
            return Err(Error::UnknownPart(unknown.kind));
        }
        let mut parts = Parts(sections);
        let (metadata, requirements): (ImageMetadata, Requirements) = (parts.need()?, parts.need()?);
        let Machine { tsc_khz, capabilities } = parts.need()?;
        let (vm, vcpus, devices) = (parts.need()?, parts.need()?, parts.need()?);
        let control_page = parts.take()?.unwrap_or_else(|| ControlPageState::forked(metadata.seq));
        let machine =
            MachineState { config: metadata.config, vm, vcpus, devices, control_page, tsc_khz, capabilities };
        let (memory, stored) = (parts.need::<Manifest>()?, parts.take::<Vec<u32>>()?);
        metadata.check()?;
        memory.check()?;
        if !compat::are_names(machine.capabilities.iter()) {
            return Err(Error::Invalid(
                "its machine has too many capabilities, or one without a proper name",
            ));
        }
        if stored.as_ref().is_some_and(|stored| stored.len() != memory.chunks().count()) {
            return Err(Error::Invalid("it does not say how its memory is stored"));
        }
        let VmShape { ram_bytes, vcpus } = metadata.config;
        let is_of_shape = machine.vcpus.len() == usize::from(vcpus)
            && memory.pages.checked_mul(PAGE_BYTES) == Some(ram_bytes);
        if vcpus == 0 || !is_of_shape {
            return Err(Error::Invalid("its vCPUs or its memory are not those of its shape"));
        }
        Ok(Self { metadata, requirements, machine, memory, stored, _grant: None })
    }

    /// The same, with the memory that it takes: for as long as it is there, or a copy of it.
    #[must_use]
    pub fn held_by(self, grant: Grant) -> Self {
        Self { _grant: Some(Arc::new(grant)), ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A part that has had another layout.
    #[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
    struct Grown {
        old: u32,
        new: u32,
    }

    impl Part for Grown {
        const KIND: u32 = 99;
        const NAME: &'static str = "a test";
        const VERSION: u32 = 7;
        const OLDEST: u32 = 6;

        fn from_older(_version: u32, body: &[u8]) -> Result<Self, codec::Error> {
            Ok(Self { old: codec::decode(body)?, new: 0 })
        }
    }

    #[test]
    fn the_version_before_is_read_and_no_other() {
        let read = |version, body| Parts(vec![Section { kind: 99, version, body }]).need::<Grown>();
        let grown = Grown { old: 1, new: 2 };
        assert_eq!(read(7, codec::encode(&grown).unwrap()).unwrap(), grown);
        assert_eq!(read(6, codec::encode(&5u32).unwrap()).unwrap(), Grown { old: 5, new: 0 });
        for version in [0, 5, 8, u32::MAX] {
            let refused = read(version, codec::encode(&5u32).unwrap());
            assert!(
                matches!(refused, Err(Error::Version { what: "a test", oldest: 6, newest: 7, .. })),
                "{version}"
            );
        }
        assert!(matches!(Parts(Vec::new()).need::<Grown>(), Err(Error::MissingPart("a test"))));
    }

    #[test]
    fn devices_of_before_have_no_generation_id() {
        let read =
            |version, body| Parts(vec![Section { kind: 6, version, body }]).need::<DevicesState>().unwrap();
        let older = codec::encode(&OlderDevicesState::from(DevicesState::power_on())).unwrap();
        assert!(!read(1, older).has_generation_id());
        assert!(read(2, codec::encode(&DevicesState::power_on()).unwrap()).has_generation_id());
    }

    #[test]
    fn vcpus_without_registers_are_refused_before_there_is_memory_for_them() {
        let read = |body| Parts(vec![Section { kind: 5, version: 2, body }]).need::<Vec<VcpuState>>();
        let whole = codec::encode(&vec![VcpuState::sample(Vec::new(), Vec::new(), 0, 0)]).unwrap();
        assert_eq!(read(whole.clone()).unwrap().len(), 1);
        // As many as the bytes could stand for where nothing is said of any.
        let many = whole.len() as u64 / 90;
        for body in
            [many.to_le_bytes().to_vec(), [&many.to_le_bytes()[..], &whole[8..]].concat(), vec![0xff; 4096]]
        {
            assert!(matches!(read(body), Err(Error::Invalid(_))));
        }
    }

    #[test]
    fn what_is_not_known_is_an_error_unless_it_says_otherwise() {
        let unknown = |kind| {
            let sections = vec![Section { kind, version: 1, body: Vec::new() }];
            Description::from_bytes(&codec::encode(&sections).unwrap()).unwrap_err()
        };
        assert!(matches!(unknown(77), Error::UnknownPart(77)));
        // It is passed over, and all else is missing.
        assert!(matches!(unknown(OPTIONAL | 77), Error::MissingPart(_)));
    }
}
