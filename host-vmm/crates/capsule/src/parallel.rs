//! Work on many chunks, on all processors.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use base::threads;

/// Makes something of each item, on all processors, in their order. After the first failure, no more are
/// begun. Each processor has a buffer of its own for it, which is left as it is from item to item.
///
/// # Errors
/// One of the failures.
///
/// # Panics
/// Where `make` does.
pub(super) fn map<T: Sync, R: Send, E: Send>(
    items: &[T],
    make: impl Fn(&mut Vec<u8>, &T) -> Result<R, E> + Sync,
) -> Result<Vec<R>, E> {
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut made, mut buffer) = (Vec::new(), Vec::new());
        while let Some((number, item)) =
            Some(next.fetch_add(1, Ordering::Relaxed)).and_then(|at| Some((at, items.get(at)?)))
        {
            let result =
                make(&mut buffer, item).inspect_err(|_| next.store(items.len(), Ordering::Relaxed))?;
            made.push((number, result));
        }
        Ok(made)
    };
    let workers = threads::processors().min(items.len());
    let parts = thread::scope(|scope| {
        // With fewer threads than there could be, it takes longer.
        let others = (1..workers).map_while(|_| thread::Builder::new().spawn_scoped(scope, work).ok());
        let others: Vec<_> = others.collect();
        let own = work();
        let join = |other: thread::ScopedJoinHandle<'_, _>| {
            other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        std::iter::once(own).chain(others.into_iter().map(join)).collect::<Result<Vec<_>, E>>()
    })?;
    let mut all: Vec<(usize, R)> = parts.into_iter().flatten().collect();
    all.sort_unstable_by_key(|(number, _)| *number);
    Ok(all.into_iter().map(|(_, made)| made).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_failures_end_it() {
        let items: Vec<u32> = (0..1000).collect();
        let doubled = map(&items, |_, item| Ok::<_, ()>(item * 2)).unwrap();
        assert!(doubled.iter().copied().eq(items.iter().map(|item| item * 2)));
        assert_eq!(map(&items, |_, &item| if item == 500 { Err(item) } else { Ok(()) }), Err(500));
        assert_eq!(map(&[], |_, _: &u32| Ok::<u32, ()>(1)), Ok(Vec::new()));
    }
}
