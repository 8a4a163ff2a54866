// SPDX-License-Identifier: GPL-2.0

//! What the `kernel` crate has no abstraction for, as the kernel's headers declare it.
//!
//! `bindgen` makes it anew whenever the module is built, from `bindings_helper.h` and the headers
//! of the very kernel that the module is built for, so that no layout can drift; sizes and offsets
//! are asserted when this is compiled. `bindings_parameters` is the whole list of what is taken:
//! the miscellaneous device and its file operations, a wait queue for `poll`, the mapping of memory
//! that is not RAM, the random pool, the clock, uevents, how a task is scheduled, and how the whole
//! machine is stopped.
//!
//! All of it is unsafe. Each use stands in the one module that makes it safe.

#![allow(
    clippy::all,
    clippy::undocumented_unsafe_blocks,
    dead_code,
    improper_ctypes,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unknown_lints,
    unnecessary_transmutes,
    unreachable_pub,
    unsafe_op_in_unsafe_fn
)]

type __kernel_size_t = usize;
type __kernel_ssize_t = isize;
type __kernel_ptrdiff_t = isize;

include!("bindings_generated.rs");
