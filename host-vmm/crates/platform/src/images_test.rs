//! Tests of [`super`].

use vmm::memory;

use super::*;

fn image(vm_type: &str, files: &[&Arc<File>]) -> Image {
    let original = VmIdentity {
        id: Uuid::nil(),
        parent: Uuid::nil(),
        name: "vm".into(),
        vm_type: "vm".into(),
        index: 0,
        count: 0,
        generation: 0,
    };
    let files = files.iter().copied().cloned().collect();
    let config = VmShape { ram_bytes: 1 << 20, vcpus: 1 };
    let (id, vm_type) = (Uuid::new_v4(), vm_type.into());
    let metadata = ImageMetadata { id, created_ns: 0, vm_type, original, config, seq: 1 };
    Image::new(Capsule { metadata, state: vec![0; 7], files }, Arc::default(), false)
}

#[test]
fn only_the_latest_of_each_type_are_kept() {
    let images = Images::new(vec!["web:2".parse().unwrap(), "*".parse().unwrap()]);
    assert!(images.wants("anything"));
    let added: Vec<Uuid> = ["web", "db", "web", "web", "db"]
        .iter()
        .map(|vm_type| {
            let image = image(vm_type, &[]);
            let (id, seal) = (image.capsule.metadata.id, Arc::clone(&image.seal));
            assert!(images.add(image).is_empty());
            images.decided(&seal, true);
            id
        })
        .collect();
    let kept: Vec<Uuid> = lock(&images.kept).images.iter().map(|image| image.capsule.metadata.id).collect();
    assert_eq!(kept, [added[2], added[3], added[4]]);
    assert!(!Images::new(vec!["web".parse().unwrap()]).wants("db"));
    assert!(images.find(&added[3].to_string()[..13]).is_ok());
    assert!(matches!(images.find(&added[0].to_string()), Err(Error::NoImage(_))));
    assert!(matches!(images.find(""), Err(Error::NoImage(_))));
    images.close();
    assert_eq!(images.add(image("web", &[])).len(), 1);
    assert!(lock(&images.kept).images.is_empty());
}

#[test]
fn no_image_takes_the_place_of_another_before_it_is_sealed() {
    let images = Images::new(vec!["*:2".parse().unwrap()]);
    let add = |original: u128| {
        let mut image = image("web", &[]);
        image.capsule.metadata.original.id = Uuid::from_u128(original);
        image.seal = Arc::default();
        let (id, seal) = (image.id(), Arc::clone(&image.seal));
        (id, seal, images.add(image).len())
    };
    let kept = || lock(&images.kept).images.iter().map(|image| image.id()).collect::<Vec<_>>();
    let [first, second, third] = [(); 3].map(|()| add(1));
    assert_eq!([first.2, second.2, third.2], [0, 0, 1], "of one VM no more wait than are kept");
    let others = [add(2), add(2)];
    assert!(kept().is_empty() && images.ids().is_empty() && images.all().len() == 4);
    assert!(images.find(&third.0.to_string()).is_ok());
    assert!(images.decided(&first.1, true).is_empty(), "it is gone");
    for (id, seal, _) in [&second, &third] {
        assert!(images.decided(seal, true).is_empty() && kept().contains(id));
    }
    assert_eq!(images.decided(&others[0].1, false).len(), 1);
    assert_eq!(kept(), [second.0, third.0], "one that can't be sealed takes nobody's place");
    assert_eq!(images.decided(&others[1].1, true).len(), 1);
    assert_eq!(kept(), [third.0, others[1].0]);
}

#[test]
fn what_has_come_stays_for_a_while() {
    let images = Images::new(Vec::new());
    let received: Vec<Arc<Image>> = (0..MAX_RECEIVED + 1).map(|_| Arc::new(image("web", &[]))).collect();
    let out: Vec<usize> = received.iter().map(|image| images.add_received(image).len()).collect();
    assert_eq!(out, [0, 0, 0, 0, 1]);
    assert_eq!(images.add_received(&received[2]).len(), 1, "it has come again");
    let now = Instant::now();
    assert!(images.evict_received(now).is_empty());
    assert_eq!(images.all().len(), MAX_RECEIVED);
    let oldest = images.evict_oldest_received().unwrap();
    assert!(Arc::ptr_eq(&oldest, &received[1]));
    assert_eq!(images.evict_received(now + RECEIVED_FOR).len(), MAX_RECEIVED - 1);
    assert!(images.all().is_empty());
}

#[test]
fn shared_layers_are_told_apart() {
    let file = |pages: usize| Arc::new(memory::sealed("test", &vec![1; pages * 4096]).unwrap());
    let (base, one, other) = (file(3), file(1), file(2));
    let images = [image("web", &[&base, &one]), image("web", &[&base, &other])];
    let mut holders = HashMap::new();
    for image in &images {
        for (inode, _) in layers(image).unwrap() {
            *holders.entry(inode).or_default() += 1;
        }
    }
    let told = images.map(|image| describe(&image, &holders).unwrap());
    assert_eq!(told.map(|image| (image.shared_bytes, image.private_bytes)), [(12288, 4096), (12288, 8192)]);
}

#[test]
fn mistakes_are_told() {
    for bad in ["", "web:0", "web:x", "We b", "web:", ":1"] {
        assert!(bad.parse::<Keep>().is_err(), "{bad}");
    }
}
