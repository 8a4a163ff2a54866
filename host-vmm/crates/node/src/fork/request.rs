//! What a guest asked for: checked once, here.

use types::Locality;
use uuid::Uuid;
use vmfork_abi::{ErrorCode, MAX_CHILDREN, Request, doorbell, flags, is_vm_type, padded_text};

use crate::wire::ForkOrder;

/// Checks a ring's command, and the copy of the request that came with it, in the VM `vm_id`.
pub(super) fn validate(command: Option<u32>, request: &Request, vm_id: Uuid) -> Result<ForkOrder, ErrorCode> {
    if command != Some(doorbell::FORK) {
        return Err(ErrorCode::UnknownCommand);
    }
    let location = match request.flags {
        0 => Locality::Any,
        flags::LOCAL => Locality::Local,
        flags::REMOTE => Locality::Remote,
        _ => return Err(ErrorCode::InvalidFlags),
    };
    if request.reserved.iter().any(|&byte| byte != 0) {
        return Err(ErrorCode::InvalidFlags);
    }
    if request.asker != [0; 16] && request.asker != vm_id.into_bytes() {
        return Err(ErrorCode::Copied);
    }
    if !(1..=MAX_CHILDREN).contains(&request.count) {
        return Err(ErrorCode::InvalidCount);
    }
    let vm_type =
        padded_text(&request.vm_type).filter(|name| is_vm_type(name)).ok_or(ErrorCode::InvalidType)?;
    Ok(ForkOrder::Guest { seq: request.seq, count: request.count, vm_type: vm_type.to_owned(), location })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vmfork_abi::pad_text;

    use super::*;

    const VM: Uuid = Uuid::from_u128(5);

    fn good() -> Request {
        Request { seq: 9, count: 4, vm_type: pad_text("web").unwrap(), ..Default::default() }
    }

    #[test]
    fn a_good_request_is_an_order() {
        for (flags, location) in
            [(0, Locality::Any), (flags::LOCAL, Locality::Local), (flags::REMOTE, Locality::Remote)]
        {
            let order = validate(Some(doorbell::FORK), &Request { flags, ..good() }, VM).unwrap();
            assert_eq!(order, ForkOrder::Guest { seq: 9, count: 4, vm_type: "web".into(), location });
        }
    }

    #[test]
    fn request_of_another_vm_is_refused() {
        let of = |vm: Uuid| validate(Some(doorbell::FORK), &Request { asker: vm.into_bytes(), ..good() }, VM);
        of(VM).unwrap();
        of(Uuid::nil()).unwrap();
        assert_eq!(of(Uuid::from_u128(6)), Err(ErrorCode::Copied));
    }

    #[test]
    fn each_mistake_has_its_code() {
        let refused = |command, request: Request| validate(command, &request, VM).unwrap_err();
        assert_eq!(refused(None, good()), ErrorCode::UnknownCommand);
        assert_eq!(refused(Some(0), good()), ErrorCode::UnknownCommand);
        let ask = |request| refused(Some(doorbell::FORK), request);
        assert_eq!(ask(Request { count: 0, ..good() }), ErrorCode::InvalidCount);
        assert_eq!(ask(Request { count: MAX_CHILDREN + 1, ..good() }), ErrorCode::InvalidCount);
        assert_eq!(ask(Request { flags: flags::LOCAL | flags::REMOTE, ..good() }), ErrorCode::InvalidFlags);
        assert_eq!(ask(Request { flags: 4, ..good() }), ErrorCode::InvalidFlags);
        assert_eq!(ask(Request { reserved: [1; 64], ..good() }), ErrorCode::InvalidFlags);
        assert_eq!(ask(Request { vm_type: [0; 32], ..good() }), ErrorCode::InvalidType);
        assert_eq!(ask(Request { vm_type: [0xff; 32], ..good() }), ErrorCode::InvalidType);
        assert_eq!(ask(Request { vm_type: pad_text("../x").unwrap(), ..good() }), ErrorCode::InvalidType);
    }

    proptest! {
        #[test]
        fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), Request::BYTES), command: Option<u32>) {
            let request = Request::from_bytes(bytes.as_slice().try_into().unwrap());
            if let Ok(ForkOrder::Guest { vm_type, count, .. }) = validate(command, &request, VM) {
                prop_assert!(is_vm_type(&vm_type) && (1..=MAX_CHILDREN).contains(&count));
            }
        }
    }
}
